"""This machine: every pass is a Python process of its own with a minimal environment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

from device_bench.devices.base import Device, Progress
from device_bench.telemetry import Identity, identify_host
from device_bench.worker import Job
from vlm.errors import CheckFailed, UserError

# What a Python process with an engine may need; everything else of the user's environment stays out.
PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH")
# What an engine that compiles itself on first use needs besides: compilers, and where it keeps what it compiled.
COMPILING = ("CC", "CXX")
CACHE = "POCKETVLM_CACHE"
THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class LocalDevice(Device):
    """Runs passes in `python -m device_bench.worker` from a scratch folder."""

    spec = "local"
    settings = frozenset({"min_seconds"})
    _running: subprocess.Popen[str] | None = None
    _interrupted = False

    @cached_property
    def _scratch(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="pocketvlm-bench-"))

    def identify(self) -> Identity:
        """Identify this machine."""
        return identify_host()

    def push(self, artifact: Path) -> Path:
        """Nothing to bring: the artifact is read where it lies."""
        return artifact.resolve()

    def run(self, job: dict[str, Any], log: Path, timeout_s: float, on_progress: Progress) -> dict[str, Any]:
        """Run one pass in a fresh process."""
        result = self._scratch / "result.json"
        result.unlink(missing_ok=True)
        full = Job(**job, result=result, answers=self._scratch / "answers.jsonl")
        job_file = self._scratch / "job.json"
        job_file.write_text(full.model_dump_json())
        # faulthandler: a crash in an engine's native code leaves a stack in the log.
        command = [sys.executable, "-X", "faulthandler", "-m", "device_bench.worker", str(job_file)]
        code, timed_out = self._supervise(command, _environment(full.threads), log, timeout_s, on_progress)
        if self._interrupted:
            raise KeyboardInterrupt
        what = f"{full.artifact.name}: the {full.kind} pass"
        if timed_out:
            raise CheckFailed(f"{what} took longer than {timeout_s:g} s and was killed. Raise timeout_s or see {log}.")
        answer = json.loads(result.read_text()) if result.is_file() else {}
        if "user_error" in answer:
            raise UserError(answer["user_error"])
        if code != 0 or not answer:
            raise CheckFailed(f"{what} {_ending(code)}. Its output: {log}{_last_line(log)}")
        return dict(answer)

    def pull(self, name: str, to: Path) -> None:
        """Move a file out of the scratch folder; nothing happens when the pass did not get to write it."""
        if (self._scratch / name).is_file():
            shutil.move(self._scratch / name, to)

    def _supervise(
        self, command: list[str], environment: dict[str, str], log: Path, timeout_s: float, on_progress: Progress
    ) -> tuple[int, bool]:
        """Run a process group to its end or its deadline; returns exit code and whether the deadline killed it."""
        timed_out = threading.Event()
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=self._scratch,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,
            )
            self._running = process

            def expire() -> None:
                timed_out.set()
                os.killpg(process.pid, signal.SIGKILL)

            deadline = threading.Timer(timeout_s, expire)
            deadline.start()
            try:
                _follow(process, on_progress)
                return process.wait(), timed_out.is_set()
            finally:
                deadline.cancel()
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def interrupt(self) -> None:
        """Kill the pass that runs."""
        self._interrupted = True
        if self._running is not None and self._running.poll() is None:
            os.killpg(self._running.pid, signal.SIGKILL)

    def clean_up(self) -> None:
        """Remove the scratch folder, if a pass ran."""
        if "_scratch" in vars(self):
            shutil.rmtree(self.__dict__.pop("_scratch"), ignore_errors=True)


def open(target: str) -> LocalDevice:
    """Return this machine.

    Raises:
        UserError: a target was given; there is only one local device.
    """
    if target:
        raise UserError(f"--device local:{target}: 'local' takes no target. Type --device local.")
    return LocalDevice()


def _environment(threads: int) -> dict[str, str]:
    kept = {name: os.environ[name] for name in (*PASSED_ON, *COMPILING) if name in os.environ}
    if os.environ.get(CACHE):
        kept[CACHE] = str(Path(os.environ[CACHE]).resolve())  # the process works in another folder
    packages = str(Path(__file__).resolve().parents[2])  # where vlm and device_bench are imported from
    kept["PYTHONPATH"] = os.pathsep.join(part for part in (kept.get("PYTHONPATH"), packages) if part)
    return {**kept, **dict.fromkeys(THREAD_SETTINGS, str(threads))}


def _follow(process: subprocess.Popen[str], on_progress: Progress) -> None:
    """Pass progress lines on until the process closes its output."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            report = json.loads(line)
            on_progress(report["fraction"], report["message"])


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (most often: out of memory)" if name == "SIGKILL" else "")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f" (last line: {lines[-1].strip()})" if lines else ""
