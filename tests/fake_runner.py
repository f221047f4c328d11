"""Stands for pocketvlm-runner: reads a job folder and writes results of the same form, at once and without a model.

`python fake_runner.py JOB_FOLDER`. A file `dies` in the device's folder makes it vanish with its session after so
many answers, once; `slow` makes the times of the first answers longer.
"""

import os
import signal
import sys
import time
from pathlib import Path


def uptime() -> float:
    """Seconds on the clock of /proc/uptime."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main(folder: Path) -> None:
    """Answer every request with the end of the ids that it was asked with."""
    lines = [line.split() for line in (folder / "job.txt").read_text().splitlines()]
    job = {words[0]: words[1] for words in lines if words[0] != "request"}
    requests = [words[1:] for words in lines if words[0] == "request"]
    count, picture = int(job["max_new_tokens"]), ""
    dies = folder.parents[1] / "dies"
    with (folder / "results.txt").open("w", buffering=1) as out:
        cpus = next(line for line in Path("/proc/self/status").read_text().splitlines() if "Cpus_allowed_list" in line)
        out.write(f"cpus {cpus.split()[1]}\nload_ms 1.5\nstart_s {uptime():.3f}\n")
        began = time.monotonic()
        answered = 0

        def answer(name: str, words: list[str]) -> None:
            nonlocal answered, picture
            seen = "" if words[0] == "-" or ("reuse_images" in job and words[0] == picture) else " vision_ms 2"
            picture = words[0]
            steps = " 1.000" * (count - 1)
            tokens = " ".join(words[-count:])
            out.write(
                f"answer {name} end_s {uptime():.3f}{seen} prefill_ms 3 prefill_tokens {len(words) - 1} ttft_ms 5"
                f" decode_ms{steps} tokens {tokens}\n"
            )
            answered += 1
            if dies.is_file() and answered == int(dies.read_text()):
                dies.unlink()
                os.killpg(0, signal.SIGKILL)

        for index, request in enumerate(requests):
            if index == int(job.get("repeat_from", 0)):
                began = time.monotonic()
            answer(request[0], request[1:])
        again = 0
        while time.monotonic() - began < float(job.get("repeat_s", 0)):
            time.sleep(0.02)
            again += 1
            answer(f"{requests[-1][0]}+{again}", requests[-1][1:])
        out.write(f"vm_hwm_kib 20480\ndone {answered}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
