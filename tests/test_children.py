"""A child process ends with the one that started it, and may itself have children."""

import os
import subprocess
import sys
from queue import Queue
from typing import Any

from vlm import children

ROOT = os.path.dirname(os.path.dirname(__file__))
FORKS = """
import multiprocessing
from vlm import children
children.end_with_parent()
child = multiprocessing.get_context("fork").Process(target=print)
child.start()
child.join(20)
children.say(exitcode=child.exitcode)
"""


def test_a_child_forks_data_workers(tmp_path: Any) -> None:
    events: Queue[tuple[str, dict[str, Any] | None]] = Queue()
    environment = {**os.environ, "PYTHONPATH": ROOT}
    process = children.start("one", [sys.executable, "-c", FORKS], tmp_path / "log", environment, events)
    try:
        assert events.get(timeout=60) == ("one", {"exitcode": 0})
    finally:
        process.kill()


def test_a_child_ends_when_its_standard_input_does() -> None:
    code = "import threading; from vlm import children; children.end_with_parent(); children.say(); "
    code += "threading.Event().wait(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert process.stdout and process.stdin and process.stdout.readline() == "{}\n"
    process.stdin.close()
    assert process.wait(timeout=30) == 1
