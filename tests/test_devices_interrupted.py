"""Ctrl-C while several devices are measured: whatever waits for one of them ends at once, and each is left clean."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from device_bench import run as bench_run
from device_bench.config import BenchConfig
from device_bench.devices import _method
from device_bench.devices.local import LocalDevice
from tests.shell_link import ShellLink
from tests.test_devices_bench import QUICK, Board, artifact, board
from vlm.errors import UserError

__all__ = ["artifact", "board"]
SOON_S = 30  # far below what each of them would wait, with a slow machine's margin


def interrupted(board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch, when: Callable[[], object]) -> None:
    """Measure on two devices, of which the other has nothing to do, until `when`; then Ctrl-C."""

    class Idle(LocalDevice):
        def push(self, artifact: Path) -> Path:
            raise UserError("nothing to do here")

    monkeypatch.setattr(bench_run, "open_device", lambda spec: Idle() if spec == "local" else board)

    def wait(queues: Any) -> None:
        until = time.monotonic() + SOON_S
        while not when():
            assert time.monotonic() < until
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_run, "wait", wait)
    begun, config = time.monotonic(), BenchConfig(**{**QUICK, "cool_s": 1200})
    with pytest.raises(KeyboardInterrupt):
        bench_run.run_on(["ssh:me@board", "local"], config, [artifact], artifact.parent / "results")
    assert time.monotonic() - begun < 2 * SOON_S


def test_a_cool_down_ends_at_once_and_the_device_is_left_clean(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_method, "POLL_S", 600)
    board.write("class/thermal/thermal_zone0/temp", 90_000)
    cooling = threading.Event()
    pause = board.link.pause
    monkeypatch.setattr(board.link, "pause", lambda seconds: (cooling.set(), pause(seconds)))
    interrupted(board, artifact, monkeypatch, cooling.is_set)
    assert not Path(board.root()).exists() and not Path(board.claim.file).exists()


def test_a_broken_connection_is_waited_for_no_longer(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device_bench.devices._remote.HURRIED_S", 0.1)
    run_once = board._run_once

    def unplug(job: Any, *words: Any) -> None:
        board.link.breaks = 10**9  # type: ignore[attr-defined]
        run_once(job, *words)

    monkeypatch.setattr(board, "_run_once", unplug)
    interrupted(board, artifact, monkeypatch, lambda: board.link.revived > 0)  # type: ignore[attr-defined]
    assert board.link.gone


def test_a_silent_device_is_listened_to_no_longer() -> None:
    link = ShellLink()
    timer = threading.Timer(0.2, lambda: setattr(link, "interrupted", True))
    timer.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(link.follow("exec sleep 600", 600))
    assert time.monotonic() - begun < SOON_S


def test_a_pass_on_this_machine_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = LocalDevice()
    monkeypatch.setattr("device_bench.devices.local.sys.executable", "/bin/sh")
    monkeypatch.setattr("device_bench.devices.local._environment", lambda threads: {})
    run = device._supervise
    sleeping = ["/bin/sleep", "600"]
    monkeypatch.setattr(device, "_supervise", lambda command, *rest: run(sleeping, *rest))
    threading.Timer(0.5, device.interrupt).start()
    job = {**dict.fromkeys(("threads", "warmup", "iterations", "decode_tokens", "scenes", "max_new_tokens"), 1)}
    more = {"kind": "load", "artifact": tmp_path, "tasks": [], "data": None, "limit": None, "part": (0, 1)}
    with pytest.raises(KeyboardInterrupt):
        device.run({**job, **more, "min_seconds": 0}, tmp_path / "log", 600, lambda done, text: None)
    device.clean_up()
