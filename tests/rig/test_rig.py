"""`pocketvlm bench` against real parts: adb and arm64 adbd, arm64 sshd, arm64 runners on an emulated processor."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from device_bench.config import BenchConfig
from device_bench.devices import open_device
from device_bench.devices._remote import RemoteDevice
from device_bench.evaluate import evaluate, scenes_questions
from device_bench.run import Progress, bench_one, silent
from tests.rig.rig import HERE, LOOPBACK, Rig, free_port, listening, missing, until
from vlm.errors import UserError
from vlm.runtimes import open_runtime

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

ENGINES = {"executorch": "executorch:fp32", "onnx": "onnx:fp32", "llamacpp": "gguf:f16"}
MAX_NEW_TOKENS = 4
QUICK: dict[str, Any] = {
    "iterations": 2,
    "warmup": 1,
    "cold_loads": 1,
    "decode_tokens": 2,
    "scenes": 1,
    "threads": 1,
    "max_new_tokens": MAX_NEW_TOKENS,
    "min_seconds": 0,
    "idle_s": 0,
}
UNPLUGS = int(os.environ.get("RIG_UNPLUGS", "2"))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("rig"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rig.environment.items():
            patch.setenv(name, value)
        rig.start_adbd()
        rig.start_sshd()
        yield rig
    rig.close()


@pytest.fixture
def spec(rig: Rig, request: pytest.FixtureRequest) -> str:
    return {"adb": "adb", "ssh": f"ssh:root@127.0.0.1:{rig.ssh_port}"}[request.param]


over_both = pytest.mark.parametrize("spec", ["adb", "ssh"], indirect=True)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of each engine: from the folder $RIG_ARTIFACTS, else of a random model of one layer."""
    if chosen := os.environ.get("RIG_ARTIFACTS"):
        formats = {engine: target.partition(":")[0] for engine, target in ENGINES.items()}
        return {engine: sorted(Path(chosen).glob(f"{name}-*"))[0] for engine, name in formats.items()}
    pytest.importorskip("executorch.exir", reason="executorch is not installed")
    from tests.artifacts import write_artifact
    from tests.tiny import save_random_checkpoint
    from vlm.models.checkpoint import load_checkpoint

    base = tmp_path_factory.mktemp("artifacts")
    checkpoint = load_checkpoint(save_random_checkpoint(base / "checkpoint", num_hidden_layers=1))
    for engine, target in ENGINES.items():
        (base / engine).mkdir()
        write_artifact(checkpoint, target, base / engine)
    return {engine: base / engine for engine in ENGINES}


def remote(spec: str) -> RemoteDevice:
    device = open_device(spec)
    assert isinstance(device, RemoteDevice)
    device.identify()
    return device


def bench(
    spec: str, artifact: Path, out: Path, on_progress: Progress = silent, **settings: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    result = bench_one(artifact, BenchConfig(device=spec, **{**QUICK, **settings}), out, on_progress)
    tree = json.loads(result.read_text())
    answers = [json.loads(line) for line in (result.parent / tree["answers"]).read_text().splitlines()]
    return tree, answers


def host_answers(artifact: Path) -> list[str]:
    runtime = open_runtime(artifact, 1)
    return [sample.answer for sample in evaluate(runtime, scenes_questions(1), MAX_NEW_TOKENS)]


def left(rig: Rig) -> list[str]:
    """Our files and processes on the device."""
    return rig.files() + rig.processes()


def test_every_server_listens_on_loopback_alone(rig: Rig) -> None:
    for port in (rig.adb_server, rig.adbd_port, rig.ssh_port):
        assert listening(port) and listening(port) <= LOOPBACK


@over_both
def test_the_device_is_recognised_as_emulated(spec: str) -> None:
    identity = remote(spec).identify()
    assert (identity.kind, identity.arch in ("arm64-v8a", "aarch64")) == ("emulated", True)


@over_both
def test_exit_codes_errors_and_quoting_survive_the_real_connection(spec: str) -> None:
    link = remote(spec).link
    done = link.run("echo out; echo err >&2; exit 7")
    assert (done.code, done.out, done.err.strip()) == (7, "out\n", "err")
    nasty = ["a b", "$(id)", "`id`", "'", '"', "\\", "*", ";", "\n", "é"]
    assert link.words("printf", "%s\\0", *nasty).out.split("\0")[:-1] == nasty


@over_both
def test_a_large_file_arrives_and_returns_unchanged(rig: Rig, spec: str, tmp_path: Path) -> None:
    device = remote(spec)
    (tmp_path / "large").write_bytes(random.Random(0).randbytes(100_000_000))
    try:
        assert device.workspace.push({"job/large": tmp_path / "large"}) == ["job/large"]
        assert device.workspace.push({"job/large": tmp_path / "large"}) == []
        device.workspace.pull("job/large", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()
    finally:
        device.clean_up()
    assert left(rig) == []


@over_both
@pytest.mark.parametrize("engine", ENGINES)
def test_a_device_gives_the_hosts_answers_and_nothing_is_left(
    rig: Rig, spec: str, engine: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    tree, answers = bench(spec, artifacts[engine], tmp_path)
    assert [answer["answer"] for answer in answers] == host_answers(artifacts[engine])
    assert tree["device"]["kind"] == "emulated" and tree["valid"] is True
    assert tree["imported"] == {"torch": False, "transformers": False, "deepspeed": False}
    assert tree["load_ms"] > 0 and tree["decode_tok_s"]["n"] >= 2 and tree["peak_rss_mb"] > 5
    assert tree["energy_j"] is None and tree["reasons"]["energy_j"]
    assert left(rig) == []


def test_a_device_that_is_unplugged_again_and_again_still_gives_the_hosts_answers(
    rig: Rig, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    dice, over, begun = random.Random(1), threading.Event(), threading.Event()

    unplugged = 0

    def unplug() -> None:
        nonlocal unplugged
        begun.wait()
        while unplugged < UNPLUGS and not over.wait(dice.uniform(0.1, 6)):
            unplugged += 1
            rig.stop("adbd")
            over.wait(dice.uniform(0, 2))
            rig.start_adbd_only()

    hand = threading.Thread(target=unplug)
    hand.start()
    try:
        _, answers = bench(f"adb:{rig.serial}", artifacts["onnx"], tmp_path, lambda done, text: begun.set())
    finally:
        over.set()
        begun.set()
        hand.join()
        rig.connect()
    print(f"unplugged {unplugged} times")
    assert [answer["answer"] for answer in answers] == host_answers(artifacts["onnx"])
    assert left(rig) == []


@over_both
def test_a_runner_that_is_late_is_killed_on_the_device(
    rig: Rig, spec: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    from vlm.errors import CheckFailed

    with pytest.raises(CheckFailed, match=r"took longer than 2 s and was killed"):
        bench(spec, artifacts["onnx"], tmp_path, timeout_s=2, decode_tokens=60)
    assert left(rig) == []


def test_a_phone_that_was_not_allowed_says_what_to_accept(rig: Rig) -> None:
    port = free_port()
    locked = subprocess.Popen([sys.executable, str(HERE / "unauthorized.py"), str(port)])
    try:
        until(lambda: listening(port), 20, "the locked phone")
        assert listening(port) <= LOOPBACK
        rig.adb("connect", f"127.0.0.1:{port}")
        until(lambda: "unauthorized" in rig.adb("devices"), 30, "unauthorized")
        with pytest.raises(UserError, match=r"unauthorized.*Allow USB debugging"):
            open_device(f"adb:127.0.0.1:{port}").identify()
        with pytest.raises(UserError, match=r"several devices are connected.*Name one"):
            open_device("adb").identify()
    finally:
        locked.kill()
        locked.wait()
        rig.adb("disconnect", f"127.0.0.1:{port}")
        until(lambda: str(port) not in rig.adb("devices"), 20, "disconnect")


def test_a_board_whose_key_changed_or_that_is_off_is_refused(rig: Rig) -> None:
    known = rig.work / "known_hosts"
    kept = known.read_text()
    spec = f"ssh:root@127.0.0.1:{rig.ssh_port}"
    try:
        other = (rig.device / "opt" / "ssh" / "user.pub").read_text().split()
        known.write_text(f"[127.0.0.1]:{rig.ssh_port} {other[0]} {other[1]}\n")
        with pytest.raises(UserError, match=r"another machine"):
            open_device(spec).identify()
        known.write_text("")
        with pytest.raises(UserError, match=r"Connect once by hand"):
            open_device(spec).identify()
    finally:
        known.write_text(kept)
    with pytest.raises(UserError, match=r"Start the ssh server"):
        open_device(f"ssh:root@127.0.0.1:{free_port()}").identify()


def test_a_phone_that_is_gone_for_good_is_said_to_be_gone(rig: Rig) -> None:
    device = remote(f"adb:{rig.serial}")
    rig.stop("adbd")
    started = time.monotonic()
    try:
        with pytest.raises(UserError, match=r"offline|no device|does not answer"):
            device.link.wait(3)
    finally:
        rig.start_adbd_only()
        device.link.wait()
    assert time.monotonic() - started < 60
