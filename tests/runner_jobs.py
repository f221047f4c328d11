"""Job folders for pocketvlm-runner (android_harness/README.md), and what it wrote."""

import subprocess
from pathlib import Path

from vlm.runtimes.base import Runtime

MAX_NEW_TOKENS = 8


def run_job(
    program: Path,
    folder: Path,
    model: Path,
    runtime: Runtime,
    requests: list[tuple[str, str, list[int]]],
    **more: float,
) -> subprocess.CompletedProcess[str]:
    """Write a job for a runtime's model into `folder` and run it."""
    facts = runtime.facts
    settings = {
        "model": model,
        "threads": 2,
        "eos": facts.eos_id,
        "image_token": facts.image_token_id,
        "context": facts.context_length,
        "max_new_tokens": MAX_NEW_TOKENS,
        **more,
    }
    lines = [f"{key} {value}" for key, value in settings.items()]
    lines += [f"request {name} {image} {' '.join(map(str, ids))}" for name, image, ids in requests]
    (folder / "job.txt").write_text("\n".join(lines) + "\n")
    return run(program, folder)


def run(program: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a job folder."""
    return subprocess.run([str(program), str(folder)], capture_output=True, text=True, check=False, timeout=60)


def answers(folder: Path) -> dict[str, list[int]]:
    """Token ids of every answer by its request's name."""
    lines = (folder / "results.txt").read_text().splitlines()
    return {line.split()[1]: tokens_of(line) for line in lines if line.startswith("answer ")}


def tokens_of(line: str) -> list[int]:
    """Token ids of an answer's line."""
    return [int(word) for word in line.partition(" tokens")[2].split()]
