"""The device that all tests of this folder share, and an artifact of each engine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_bench.devices import open_device
from device_bench.devices._remote import RemoteDevice
from pocketvlm.console import ended_gently
from tests.rig.rig import Rig, missing

# The built-in default's artifacts that devices have runners for.
TARGETS = {
    "executorch": "executorch:fp32",
    "executorch-8da4w": "executorch:8da4w",
    "onnx": "onnx:fp32",
    "onnx-int4": "onnx:int4",
    "llamacpp": "gguf:f16",
    "llamacpp-q4_0": "gguf:q4_0",
}
DEFAULT = Path("runs") / "tiny" / "artifacts"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the rig every test of this folder is skipped."""
    if why := missing():
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The emulated device with adbd and sshd, and a PATH on which adb and ssh find it.

    A run that is ended from outside stops its servers and shows what it has found so far.
    """
    rig = Rig(tmp_path_factory.mktemp("rig"))
    with pytest.MonkeyPatch.context() as patch, ended_gently():
        for name, value in rig.environment.items():
            patch.setenv(name, value)
        try:
            rig.start_adbd()
            rig.start_sshd()
            yield rig
            assert rig.elsewhere() == set()
        finally:
            rig.close()


@pytest.fixture
def spec(rig: Rig, request: pytest.FixtureRequest) -> str:
    """What `--device` takes for the device over the connection that the test names."""
    return {"adb": "adb", "ssh": f"ssh:root@127.0.0.1:{rig.ssh_port}"}[request.param]


over_both = pytest.mark.parametrize("spec", ["adb", "ssh"], indirect=True)


def remote(spec: str) -> RemoteDevice:
    """A device that answers."""
    device = open_device(spec)
    assert isinstance(device, RemoteDevice)
    device.identify()
    return device


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What TARGETS names: the built-in default's where `make mobile` has made them, else of a random model.

    $RIG_ARTIFACTS names another folder of them.
    """
    made = Path(os.environ.get("RIG_ARTIFACTS", DEFAULT))
    ready = {name: made / target.replace(":", "-") for name, target in TARGETS.items()}
    if all((folder / "manifest.json").is_file() for folder in ready.values()):
        return ready
    pytest.importorskip("executorch.exir", reason="executorch is not installed")
    from tests.artifacts import write_artifact
    from tests.tiny import save_random_checkpoint
    from vlm.models.checkpoint import load_checkpoint

    base = tmp_path_factory.mktemp("artifacts")
    checkpoint = load_checkpoint(save_random_checkpoint(base / "checkpoint", num_hidden_layers=1))
    for name, target in TARGETS.items():
        (base / name).mkdir()
        write_artifact(checkpoint, target, base / name)
    return {name: base / name for name in TARGETS}
