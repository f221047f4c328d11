"""`pocketvlm bench` on real parts: arm64 runners of all engines over adb and ssh give the host's answers."""

import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from device_bench.config import BenchConfig
from device_bench.devices import open_device
from device_bench.devices.base import Progress
from device_bench.evaluate import evaluate
from device_bench.gate import gate
from device_bench.judge import Allowances
from device_bench.metrics import NAMES
from device_bench.report import write
from device_bench.run import bench_one, run_on, silent
from device_bench.tasks.scenes import questions
from tests.rig.conftest import TARGETS, over_both
from tests.rig.rig import Rig
from tests.rig.sockets import LOOPBACK, listening
from vlm.errors import CheckFailed
from vlm.runtimes import open_runtime

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
UNPLUGS = int(os.environ.get("RIG_UNPLUGS", "20"))


def bench(
    spec: str, artifact: Path, out: Path, on_progress: Progress = silent, **settings: Any
) -> tuple[dict[str, Any], list[str]]:
    """Result and answers of one artifact on the device."""
    result = bench_one(artifact, BenchConfig(device=spec, **{**QUICK, **settings}), out, on_progress)
    tree = json.loads(result.read_text())
    lines = (result.parent / tree["answers"]).read_text().splitlines()
    return tree, [json.loads(line)["answer"] for line in lines]


def host_answers(artifact: Path) -> list[str]:
    runtime = open_runtime(artifact, 1)
    return [sample.answer for sample in evaluate(runtime, questions(1), MAX_NEW_TOKENS)]


@over_both
@pytest.mark.parametrize("target", TARGETS)
def test_a_device_gives_the_hosts_answers_no_speed_is_shown_and_nothing_is_left(
    rig: Rig, spec: str, target: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    tree, answers = bench(spec, artifacts[target], tmp_path)
    assert answers == host_answers(artifacts[target])
    assert tree["device"]["kind"] == "emulated" and tree["valid"] is True
    assert tree["imported"] == {"torch": False, "transformers": False, "deepspeed": False}
    assert tree["load_ms"] > 0 and tree["decode_tok_s"]["n"] >= 2 and tree["peak_rss_mb"] > 5
    assert tree["energy_j"] is None and tree["reasons"]["energy_j"]
    assert rig.left() == []
    write(tmp_path, tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    shown = report["artifacts"][0]["benches"][0]
    assert shown["accuracy"] and [shown[name] for name in NAMES] == [None] * len(NAMES)
    judged = gate(tmp_path / "report", tmp_path / "report" / "report.json", Allowances())
    assert not {check.group for check in judged.checks} & {"latency", "memory"}


@over_both
def test_a_device_that_is_unplugged_again_and_again_still_gives_the_hosts_answers(
    rig: Rig, spec: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    server = {"adb": "adbd", "ssh": "sshd"}[spec[:3]]
    named = f"adb:{rig.serial}" if server == "adbd" else spec  # one that is gone has no place in the list of devices
    dice, over, begun, unplugged = random.Random(1), threading.Event(), threading.Event(), 0

    def unplug() -> None:
        nonlocal unplugged
        begun.wait()
        while unplugged < UNPLUGS and not over.wait(dice.uniform(0.1, 6)):
            unplugged += 1
            rig.unplug(server)
            over.wait(dice.uniform(0, 2))
            rig.plug(server)

    hand = threading.Thread(target=unplug)
    hand.start()
    try:
        while hand.is_alive():
            _, answers = bench(named, artifacts["onnx"], tmp_path, lambda done, text: begun.set())
            assert answers == host_answers(artifacts["onnx"])
            assert rig.left() == []
        assert unplugged == UNPLUGS  # fewer where plugging it in again failed
    finally:
        over.set()
        begun.set()
        hand.join()
        rig.connect()


def test_several_devices_are_measured_at_once_each_with_its_own_queue(
    rig: Rig, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    specs = [f"adb:{rig.serial}", f"ssh:root@127.0.0.1:{rig.ssh_port}"]
    asked = [artifacts["onnx"], artifacts["executorch"]]
    said: list[str] = []
    results = run_on(specs, BenchConfig(**QUICK), asked, tmp_path, lambda done, text: said.append(text))
    order = [spec for text in said for spec in specs if text.startswith(spec)]
    assert order.index(specs[1]) < len(order) - 1 - order[::-1].index(specs[0])  # began before the other ended
    assert order.index(specs[0]) < len(order) - 1 - order[::-1].index(specs[1])
    assert len({path.parent for path in results}) == 2 and len(results) == 4
    for path, artifact in zip(results, asked * 2, strict=True):
        lines = path.with_name(json.loads(path.read_text())["answers"]).read_text().splitlines()
        assert [json.loads(line)["answer"] for line in lines] == host_answers(artifact)
    assert rig.left() == []


@over_both
def test_a_runner_that_is_late_is_killed_on_the_device(
    rig: Rig, spec: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckFailed, match=r"took longer than 2 s and was killed"):
        bench(spec, artifacts["onnx"], tmp_path, timeout_s=2, decode_tokens=60)
    assert rig.left() == []


def test_a_whole_emulated_computer_gives_the_hosts_answers(
    rig: Rig, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    serial, port = rig.start_machine()
    try:
        assert listening(port) == listening(int(serial.rpartition(":")[2])) <= LOOPBACK
        assert open_device(f"adb:{serial}").identify().kind == "emulated"
        tree, answers = bench(f"ssh:root@127.0.0.1:{port}", artifacts["onnx"], tmp_path)
        assert tree["device"]["kind"] == "emulated" and answers == host_answers(artifacts["onnx"])
        left = "ls -A /root /data/local/tmp; ls -A /tmp | grep pocketvlm; ls -l /proc/*/cwd | grep pocketvlm"
        assert rig.ssh(port, left).stdout.split() == ["/data/local/tmp:", "/root:"]
    finally:
        rig.stop("machine")
        rig.disconnect(serial)
