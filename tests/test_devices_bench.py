"""The bench on a device that is this machine's shell with a runner that only pretends: rules, energy, resuming."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import tests.fake_runner
from device_bench import run as bench_run
from device_bench.config import BenchConfig
from device_bench.devices import _link, _process, _remote, ssh
from device_bench.devices._bundle import Bundle
from device_bench.devices._requests import job_text
from device_bench.devices._sensors import Sensors
from device_bench.tasks.scenes import questions
from device_bench.telemetry import Identity
from tests.manifests import write_manifest
from tests.shell_link import ShellLink
from vlm.errors import CheckFailed
from vlm.manifest import Preprocessing

QUICK: dict[str, Any] = {
    "iterations": 3,
    "warmup": 1,
    "cold_loads": 1,
    "decode_tokens": 4,
    "scenes": 1,
    "tasks": [],
    "min_seconds": 0,
    "idle_s": 0.1,
    "cool_s": 0,
}


class Board(ssh.SshDevice):
    """This machine as a board, with a /sys of its own."""

    kind = "jetson"

    def __init__(self, folder: Path) -> None:
        super().__init__("me", "board", 22)
        self.link, self.folder, self.shared = ShellLink(), folder, str(folder)
        self.write("class/thermal/thermal_zone0/type", "cpu-thermal")
        self.write("class/thermal/thermal_zone0/temp", 45000)
        self.write("class/hwmon/hwmon1/name", "ina3221")
        self.write("class/hwmon/hwmon1/in1_label", "VDD_IN")
        self.write("class/hwmon/hwmon1/in1_input", 5000)
        self.write("class/hwmon/hwmon1/curr1_input", 1000)
        self.sensors = Sensors(False, str(folder / "sys"))
        self.sensors.locate(self.link)

    def write(self, name: str, value: object) -> None:
        path = self.folder / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")

    def root(self) -> str:
        return str(self.folder / "device")

    def look(self) -> Identity:
        return Identity(kind=self.kind, name="board", soc=None, os=None, arch="aarch64")


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    board = Board(tmp_path)
    runner = tmp_path / "pocketvlm-runner"
    runner.write_text(Path(str(tests.fake_runner.__file__)).read_text())

    class Pretending(Bundle):
        def command(self, place: str) -> list[str]:
            return [sys.executable, f"{place}/pocketvlm-runner"]

    bundle = Pretending("onnx", tmp_path, {"pocketvlm-runner": runner}, "", ())
    monkeypatch.setattr(_remote, "bundle", lambda engine, abi: bundle)
    monkeypatch.setattr(bench_run, "open_device", lambda spec: board)
    monkeypatch.setattr(_link, "POLL_S", 0.001)
    return board


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "fake-fp32"
    folder.mkdir()
    tokenizer = Tokenizer(WordLevel({"?": 0, "<image>": 1, "</s>": 2, "Yes": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_manifest(
        folder, preprocessing=Preprocessing(size=8), image_tokens=4, image_token_id=1, bos_id=0, vocab_size=9
    )
    return folder


def bench(artifact: Path, **settings: Any) -> dict[str, Any]:
    out = artifact.parent / "results"
    try:
        bench_run.bench_one(artifact, BenchConfig(device="ssh:me@board", **{**QUICK, **settings}), out)
    finally:
        results = list(out.rglob("fake-fp32.json"))
    return dict(json.loads(results[0].read_text()))


def test_a_board_is_measured_whole_and_left_clean(board: Board, artifact: Path) -> None:
    result = bench(artifact)
    assert result["valid"] is True and result["device"]["kind"] == "jetson"
    assert result["load_ms"] == 1.5 and result["peak_rss_mb"] == 20.0
    assert result["decode_tok_s"]["p50"] == pytest.approx(1000) and result["decode_tok_s"]["n"] >= 3
    assert result["state"]["gate"]["last_c"] == 45.0 and result["state"]["gate"]["problem"] is None
    assert result["thermal"]["before_c"] == {"cpu-thermal": 45.0}
    assert any("not pinned" in note for note in result["notes"])
    assert not Path(board.root()).exists()


def test_energy_is_reported_with_its_source_or_with_the_reason_why_not(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device_bench.devices._watching.Watching.interval_s", 0.1)
    result = bench(artifact, min_seconds=0.5, idle_s=1)
    assert result["energy_j"] is None and "no more than when idle" in result["reasons"]["energy_j"]
    when_timed(board, monkeypatch, lambda: board.write("class/hwmon/hwmon1/curr1_input", 2000))
    result = bench(artifact, min_seconds=0.5, idle_s=1)
    assert result["energy_j"]["source"] == "hwmon VDD_IN" and result["energy_j"]["idle_w"] > 4.9
    answers = result["ttft_ms"]["n"]
    samples = json.loads((artifact.parent / "results" / "ssh-me-board-22" / result["samples"]).read_text())
    assert 5 * 0.4 / answers < result["energy_j"]["value"] < 5 * 0.8 / answers
    assert len(samples["telemetry"]) > 3


@pytest.mark.parametrize(
    ("during", "reason"),
    [
        ({"class/thermal/thermal_zone0/temp": 70000}, r"70\.0 degrees found, at most 60 wanted"),
        ({"class/thermal/thermal_zone0/temp": -256000}, r"the temperature is unknown"),
    ],
)
def test_a_board_that_is_too_warm_or_has_no_thermometer_gives_an_invalid_result(
    board: Board, artifact: Path, during: dict[str, object], reason: str
) -> None:
    for name, value in during.items():
        board.write(name, value)
    with pytest.raises(CheckFailed, match=reason):
        bench(artifact)
    result = json.loads(next((artifact.parent / "results").rglob("fake-fp32.json")).read_text())
    assert result["valid"] is False and result["decode_tok_s"] is not None


def test_a_board_that_throttles_meanwhile_gives_an_invalid_result(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = "devices/system/cpu/cpu0/cpufreq"
    board.write(f"{cpu}/scaling_max_freq", 2000000)
    board.sensors.locate(board.link)
    when_timed(board, monkeypatch, lambda: board.write(f"{cpu}/scaling_max_freq", 1000000))
    with pytest.raises(CheckFailed, match=r"throttled during the latency pass: the system lowered processor 0"):
        bench(artifact)


def test_clocks_that_the_fixed_performance_mode_lowers_are_the_baseline_and_given_back(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = "devices/system/cpu/cpu0/cpufreq/scaling_max_freq"
    board.write(clock, 2000000)
    board.sensors.locate(board.link)

    def begin() -> bool:
        board.write(clock, 1000000)
        return True

    monkeypatch.setattr(board, "begin_timing", begin)
    monkeypatch.setattr(board, "end_timing", lambda: board.write(clock, 2000000))
    result = bench(artifact)
    assert result["valid"] is True and result["state"]["fixed_performance_mode"] is True
    board.write(clock, 1000000)

    def stop() -> None:
        raise KeyboardInterrupt

    when_timed(board, monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        bench(artifact)
    assert (board.folder / "sys" / clock).read_text() == "2000000\n" and not Path(board.root()).exists()


def when_timed(board: Board, monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Let something happen as the runner of the latency pass starts."""
    answer = board.answer

    def start(job: Any, *words: Any) -> Any:
        if job.kind == "latency":
            then()
        return answer(job, *words)

    monkeypatch.setattr(board, "answer", start)


def test_an_emulated_device_breaks_no_rules_but_says_so(board: Board, artifact: Path) -> None:
    board.kind = "emulated"
    board.write("class/thermal/thermal_zone0/temp", 70000)
    result = bench(artifact)
    assert result["valid"] is True and any("70.0 degrees" in note for note in result["notes"])


def test_a_sustained_run_is_kept_beside_the_temperatures(board: Board, artifact: Path) -> None:
    result = bench(artifact, sustained_s=0.5)
    found = result["thermal"]["sustained"]
    assert found["seconds"] >= 0.4 and len(found["tok_s"]) == 1 and found["first_throttled_s"] is None
    assert result["thermal"]["before_c"]


def test_answers_are_asked_again_only_from_where_the_device_restarted(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(questions(1))
    asked: list[int] = []
    write = _remote.job_text

    def job_text(settings: dict[str, object], requests: list[Any]) -> str:
        asked.append(len(requests))
        return write(settings, requests)

    monkeypatch.setattr(_remote, "job_text", job_text)
    follow = _process.Process._follow_once

    def restarting(self: _process.Process, watch: _process.Watch) -> Any:
        ended = follow(self, watch)
        if ended is not None and ended.code is None and not ended.late:
            raise _process.Interrupted
        return ended

    monkeypatch.setattr(_process.Process, "_follow_once", restarting)
    whole = [json.loads(line) for line in answers(bench(artifact, tasks=["scenes"]), artifact)]
    asked.clear()
    bring = board._bring

    def with_trap(fresh: bool = False) -> None:
        bring(fresh)
        if fresh:
            return
        (board.folder / "device" / "dies").unlink(missing_ok=True)

    monkeypatch.setattr(board, "_bring", with_trap)
    prepare = board.answer

    def trapped(job: Any, *rest: Any) -> Any:
        if job.kind == "accuracy":
            (board.folder / "device" / "dies").write_text("5")
        return prepare(job, *rest)

    monkeypatch.setattr(board, "answer", trapped)
    resumed = [json.loads(line) for line in answers(bench(artifact, tasks=["scenes"]), artifact)]
    assert asked[-2:] == [count, count - 5]
    assert [(row["id"], row["answer"]) for row in resumed] == [(row["id"], row["answer"]) for row in whole]


def test_a_benchmark_of_many_pictures_is_asked_in_blocks_with_the_same_answers(
    board: Board, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answers(bench(artifact, tasks=["scenes"], scenes=3), artifact)
    monkeypatch.setattr("device_bench.devices._passes.BLOCK_BYTES", 3 * 8 * 8 * 4)
    runs: list[int] = []
    monkeypatch.setattr(_remote, "job_text", lambda settings, ask: runs.append(len(ask)) or job_text(settings, ask))
    in_blocks = answers(bench(artifact, tasks=["scenes"], scenes=3), artifact)
    assert sum(runs[-3:]) == len(questions(3)) == len(whole) and min(runs[-3:]) > 1
    assert [json.loads(line)["answer"] for line in in_blocks] == [json.loads(line)["answer"] for line in whole]


def answers(result: dict[str, Any], artifact: Path) -> list[str]:
    return next((artifact.parent / "results").rglob(result["answers"])).read_text().splitlines()


def test_a_runner_that_fails_is_told_with_its_log(board: Board, artifact: Path) -> None:
    (board.folder / "pocketvlm-runner").write_text("import sys; sys.exit('no such model')")
    with pytest.raises(CheckFailed, match=r"the load pass ended with exit code 1\. Its output: .*fake-fp32\.log"):
        bench(artifact)
    assert "no such model" in next((artifact.parent / "results").rglob("fake-fp32.log")).read_text()
    assert not Path(board.root()).exists()
