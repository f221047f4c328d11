"""A bench that is ended from outside, a folder of the user's, and two benches at once, over a real connection."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from device_bench.devices._remote import RemoteDevice
from tests.rig.conftest import over_both, remote
from tests.rig.rig import Rig, until
from vlm.errors import UserError


@over_both
def test_a_bench_that_is_told_to_end_leaves_nothing(
    rig: Rig, spec: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    words = ["-m", "pocketvlm", "bench", str(artifacts["onnx"]), "--device", spec, "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, *words, "--scenes", "20"], stderr=subprocess.DEVNULL) as bench:
        until(lambda: any("pocketvlm-runner" in words for words in rig.processes()), 300, "the runner")
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


@over_both
def test_of_two_benches_that_find_a_claim_run_out_one_takes_the_device(rig: Rig, spec: str) -> None:
    def take(device: RemoteDevice) -> bool:
        try:
            device.claim.take(60)
        except UserError:
            return False
        return True

    for _ in range(3):
        late, *both = (remote(spec) for _ in range(3))
        late.claim.take(-1)
        with ThreadPoolExecutor(2) as pool:
            took = list(pool.map(take, both))
        assert sorted(took) == [False, True] and not late.claim.is_ours()
        for device in (late, *both):
            device.clean_up()
        assert rig.left() == []
