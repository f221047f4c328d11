"""What a bench that is ended from outside, and one that meets a folder of the user's, leave on a real connection."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig.conftest import over_both, remote
from tests.rig.rig import Rig, until
from vlm.errors import UserError


@over_both
def test_a_bench_that_is_told_to_end_leaves_nothing(
    rig: Rig, spec: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    words = ["-m", "pocketvlm", "bench", str(artifacts["onnx"]), "--device", spec, "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, *words, "--scenes", "20"], stderr=subprocess.DEVNULL) as bench:
        until(lambda: any("pocketvlm-runner" in words for words in rig.processes()), 120, "the runner")
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(120) == 130
    assert rig.left() == []


@over_both
def test_a_folder_of_the_users_survives(rig: Rig, spec: str, artifacts: dict[str, Path]) -> None:
    device = remote(spec)
    folder = rig.device / device.root().removeprefix("/")
    (folder / "jobs").mkdir(parents=True)
    (folder / "table.csv").write_text("mine")
    try:
        with pytest.raises(UserError, match=r"no bench has made it"):
            device.push(artifacts["onnx"])
        device.clean_up()
        assert rig.files() == [folder.name] and (folder / "table.csv").read_text() == "mine"
    finally:
        (folder / "table.csv").unlink()
        (folder / "jobs").rmdir()
        folder.rmdir()
