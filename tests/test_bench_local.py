"""The bench on this machine, with an engine that misbehaves as its manifest says."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tests.fake_engine
from device_bench.config import BenchConfig
from device_bench.devices.local import LocalDevice
from device_bench.evaluate import load_answers
from device_bench.measure import latency_stats, summarise
from device_bench.result import Recorder
from device_bench.run import bench_one, run, run_on
from device_bench.telemetry import identify_host
from tests.manifests import fake_artifact as artifact
from vlm.errors import CheckFailed, UserError

QUICK: dict[str, Any] = {
    "iterations": 3,
    "warmup": 1,
    "cold_loads": 2,
    "decode_tokens": 5,
    "scenes": 2,
    "tasks": [],
    "min_seconds": 0,
}


@pytest.fixture
def fake_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of the bench find our engine where they look for onnx."""
    (tmp_path / "python" / "engines").mkdir(parents=True)
    shutil.copy(str(tests.fake_engine.__file__), tmp_path / "python" / "engines" / "onnx.py")
    (tmp_path / "python" / "sitecustomize.py").write_text(
        f"import sys; sys.path.append({str(Path.cwd())!r})\n"
        f"import vlm.runtimes; vlm.runtimes.__path__.insert(0, {str(tmp_path / 'python' / 'engines')!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))


def measure(folder: Path, **settings: object) -> dict[str, Any]:
    path = bench_one(folder, BenchConfig(**{**QUICK, **settings}), folder.parent / "results")
    return dict(json.loads(path.read_text()))


def read_result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder.parent / "results" / "local" / f"{folder.name}.json").read_text()))


def processes(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "processes").read_text().splitlines()]


@pytest.mark.usefixtures("fake_engine")
def test_a_result_is_the_summary_of_the_samples_beside_it(tmp_path: Path) -> None:
    result = measure(artifact(tmp_path))
    samples = json.loads((tmp_path / "results" / "local" / str(result["samples"])).read_text())
    for name, stats in latency_stats(samples).items():
        assert result[name] == stats.model_dump()
        assert stats.n == 3
    assert result["load_ms"] == summarise(samples["load_ms"]).p50
    assert len(samples["load_ms"]) == 2
    assert result["valid"] is True and result["invalid_because"] is None
    assert result["imported"] == {"torch": False, "transformers": False, "deepspeed": False}
    assert {"energy_j", "accuracy"} <= result["reasons"].keys()


@pytest.mark.usefixtures("fake_engine")
def test_every_iteration_decodes_the_same_number_of_tokens_although_the_model_wants_to_end(tmp_path: Path) -> None:
    measure(artifact(tmp_path))
    samples = json.loads((tmp_path / "results" / "local" / "fake-fp32.samples.json").read_text())
    assert len(samples["decode_ms"]) == 3 * 5


@pytest.mark.usefixtures("fake_engine")
def test_every_pass_is_a_process_of_its_own_with_a_minimal_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_USER", "1")
    measure(artifact(tmp_path), threads=1)
    seen = processes(tmp_path)
    assert len({process["pid"] for process in seen}) == len(seen) == 2 + 1 + 1  # cold loads, latency, memory
    for process in seen:
        assert process["pid"] != os.getpid() and process["cwd"] != os.getcwd()
        environment = process["environment"]
        assert isinstance(environment, dict)
        assert "SECRET_OF_THE_USER" not in environment and environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.usefixtures("fake_engine")
def test_an_engine_that_compiles_itself_finds_the_users_compiler_and_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CC": "gcc-13", "CXX": "g++-13", "POCKETVLM_CACHE": "cache"}.items():
        monkeypatch.setenv(name, value)
    measure(artifact(tmp_path), cold_loads=1)
    for process in processes(tmp_path):
        assert (process["environment"]["CC"], process["environment"]["CXX"]) == ("gcc-13", "g++-13")
        assert process["environment"]["POCKETVLM_CACHE"] == str(Path("cache").resolve())


@pytest.mark.usefixtures("fake_engine")
def test_accuracy_is_scored_on_the_built_in_benchmark_and_its_answers_are_kept(tmp_path: Path) -> None:
    result = measure(artifact(tmp_path), tasks=["scenes"])
    answers = [
        json.loads(line) for line in (tmp_path / "results" / "local" / str(result["answers"])).read_text().splitlines()
    ]
    assert {answer["image"] for answer in answers} == {"scenes:950000", "scenes:950001"}
    accuracy = result["accuracy"]
    assert isinstance(accuracy, dict)
    assert accuracy["avg"]["n"] == len(answers) > 12
    assert set(accuracy["tasks"]) == {"gqa", "scienceqa", "textvqa", "mme", "mmbench", "pope"}


@pytest.mark.usefixtures("fake_engine")
def test_peak_memory_is_the_peak_during_the_answer(tmp_path: Path) -> None:
    result = measure(artifact(tmp_path, ballast="yes"))
    loaded = json.loads((tmp_path / "results" / "local" / "fake-fp32.samples.json").read_text())["rss_mb"]["loaded"]
    if loaded is None:
        pytest.skip("no /proc/self/status on this system")
    assert float(str(result["peak_rss_mb"])) > loaded + 90


@pytest.mark.usefixtures("fake_engine")
def test_an_artifact_whose_process_imports_torch_is_invalid(tmp_path: Path) -> None:
    folder = artifact(tmp_path, torch="yes")
    with pytest.raises(CheckFailed, match=r"fake-fp32.*imported torch"):
        measure(folder)
    result = read_result(folder)
    assert result["valid"] is False and "imported torch" in str(result["invalid_because"])
    assert result["imported"]["torch"] is True


@pytest.mark.usefixtures("fake_engine")
@pytest.mark.parametrize(("name", "hint"), [("SIGSEGV", ""), ("SIGKILL", "out of memory")])
def test_a_crash_names_artifact_signal_and_log(tmp_path: Path, name: str, hint: str) -> None:
    folder = artifact(tmp_path, signal=name)
    with pytest.raises(CheckFailed, match=f"fake-fp32: the load pass was killed by {name}.*{hint}.*fake-fp32.log"):
        measure(folder)
    result = read_result(folder)
    assert result["valid"] is False and name in str(result["invalid_because"])
    assert result["vision_ms"] is None and name in result["reasons"]["vision_ms"]


@pytest.mark.usefixtures("fake_engine")
def test_one_artifact_that_crashes_does_not_keep_the_others_from_being_measured(tmp_path: Path) -> None:
    folders = [artifact(tmp_path, "bad-fp32", signal="SIGABRT"), artifact(tmp_path, "good-fp32")]
    with pytest.raises(CheckFailed, match=r"^bad-fp32.*SIGABRT"):
        run(BenchConfig(**QUICK), folders, tmp_path / "results")
    assert read_result(folders[1])["valid"] is True


@pytest.mark.usefixtures("fake_engine")
def test_a_process_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(CheckFailed, match="took longer than 6 s and was killed"):
        measure(artifact(tmp_path, hang=str(tmp_path / "lock")), timeout_s=6)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the child holds it for a minute if it lives
    assert time.monotonic() - start < 40


@pytest.mark.usefixtures("fake_engine")
def test_what_the_user_must_change_is_said_in_the_engines_words(tmp_path: Path) -> None:
    folder = artifact(tmp_path, user_error="weights.bin: truncated. Export again.")
    with pytest.raises(UserError, match=r"^weights.bin: truncated. Export again.$"):
        measure(folder)
    assert not (tmp_path / "results" / "local" / "fake-fp32.json").exists()


@pytest.mark.usefixtures("fake_engine")
def test_an_emulated_engine_gets_accuracy_but_no_speed_and_no_memory(tmp_path: Path) -> None:
    result = measure(artifact(tmp_path, emulated="yes"), tasks=["scenes"])
    for name in ("load_ms", "vision_ms", "ttft_ms", "prefill_tok_s", "decode_tok_s", "peak_rss_mb", "thermal", "state"):
        assert result[name] is None
        assert result["reasons"][name].startswith("needs macOS: ")
    assert result["accuracy"] is not None and result["valid"] is True
    assert [name for name, value in result.items() if value is None and name not in result["reasons"]] == [
        "invalid_because"
    ]
    assert len(processes(tmp_path)) == 2


@pytest.mark.usefixtures("fake_engine")
def test_what_an_engine_prints_goes_to_the_log_and_disturbs_nothing(tmp_path: Path) -> None:
    result = measure(artifact(tmp_path, print='{"fraction": "nonsense"}'))
    assert "nonsense" in (tmp_path / "results" / "local" / str(result["log"])).read_text()


@pytest.mark.usefixtures("fake_engine")
def test_progress_only_grows_and_ends_at_one(tmp_path: Path) -> None:
    seen: list[float] = []
    folders = [artifact(tmp_path, "a-fp32"), artifact(tmp_path, "b-fp32")]
    config = BenchConfig(**{**QUICK, "cold_loads": 1, "tasks": ["scenes"]})
    run(config, folders, tmp_path / "results", lambda done, text: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)


@pytest.mark.usefixtures("fake_engine")
def test_several_devices_are_measured_at_once_and_one_that_fails_keeps_no_other_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(LocalDevice):
        def push(self, artifact: Path) -> Path:
            raise UserError("--device gone: not there")

    monkeypatch.setattr("device_bench.run.open_device", lambda spec: Gone() if spec == "gone" else LocalDevice())
    folder = artifact(tmp_path)
    with pytest.raises(UserError, match="--device gone: not there"):
        run_on(["local", "gone"], BenchConfig(**QUICK), [folder], tmp_path / "results")
    assert read_result(folder)["valid"] is True


@pytest.mark.parametrize(
    ("devices", "message"),
    [(["local"] * 2, "named twice"), (["local", "adb"], "serial number"), (["local", "locl"], "Did you mean 'local'")],
)
def test_devices_that_cannot_be_are_refused_before_any_is_measured(
    tmp_path: Path, devices: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_on(devices, BenchConfig(**QUICK), [artifact(tmp_path)], tmp_path / "results")


@pytest.mark.usefixtures("fake_engine")
def test_devices_of_one_kind_share_the_questions_and_the_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(spec: str) -> LocalDevice:
        device: LocalDevice = type("Named", (LocalDevice,), {"folder_name": spec.partition(":")[2]})()
        return device

    monkeypatch.setattr("device_bench.run.open_device", named)
    config = BenchConfig(**{**QUICK, "cold_loads": 1, "scenes": 3, "tasks": ["scenes"]})
    paths = run_on(["local:a", "local:b"], config, [artifact(tmp_path)], tmp_path / "shared", split=True)
    whole = json.loads(bench_one(artifact(tmp_path, "w-fp32"), config, tmp_path / "whole").read_text())
    for path in paths:
        tree = json.loads(path.read_text())
        assert tree["accuracy"] == whole["accuracy"] and "the questions were shared" in tree["notes"][-1]
        assert len(load_answers(path.with_name(tree["answers"]))) == whole["accuracy"]["avg"]["n"]
    assert [json.loads(path.read_text())["settings"]["part"] for path in paths] == [[0, 2], [1, 2]]
    with pytest.raises(UserError, match="not local and ssh"):
        run_on(["local", "ssh:me@box"], config, [tmp_path / "x"], tmp_path / "shared", split=True)


def test_a_damaged_artifact_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    good, bad = artifact(tmp_path, "good-fp32"), artifact(tmp_path, "bad-fp32")
    (bad / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="truncated or changed"):
        run(BenchConfig(), [good, bad], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_two_artifacts_of_one_name_and_unknown_tasks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    folders = [artifact(tmp_path), artifact(tmp_path / "other")]
    with pytest.raises(UserError, match="two artifacts are named 'fake-fp32'"):
        run(BenchConfig(), folders, tmp_path / "results")
    with pytest.raises(UserError, match=r"unknown task 'scene'. Did you mean 'scenes'"):
        run(BenchConfig(tasks=["scene"]), folders[:1], tmp_path / "results")


def latency_found(**found: Any) -> dict[str, Any]:
    """What a latency pass of one iteration finds on a machine with a thermometer."""
    names = ("preprocess_ms", "vision_ms", "prefill_ms", "prefill_tokens", "ttft_ms", "decode_ms")
    state = {"temperature_c": {"zone": 40.0}, "reasons": {}}
    imported = {"torch": False, "transformers": False, "deepspeed": False}
    whole = {"engine": "onnx", "emulated": False, "imported": imported, "before": state, "after": state}
    return {**whole, "samples": {name: [1.0] for name in names}, "others_share": 0.0, "others_reason": None, **found}


@pytest.mark.parametrize(("share", "noted"), [(0.04, False), (0.06, True)])
def test_latencies_of_a_busy_machine_are_marked_but_valid(tmp_path: Path, share: float, noted: bool) -> None:
    recorder = Recorder(artifact(tmp_path), BenchConfig(), identify_host(), tmp_path / "results")
    recorder.record("latency", latency_found(others_share=share))
    result = json.loads(recorder.write().read_text())
    assert result["valid"] is True
    assert any("busy" in note for note in result["notes"]) == noted == bool(result["state"]["busy"])
    assert result["thermal"] == {"before_c": {"zone": 40.0}, "after_c": {"zone": 40.0}}


def test_a_checkpoint_may_import_torch(tmp_path: Path) -> None:
    recorder = Recorder(artifact(tmp_path), BenchConfig(), identify_host(), tmp_path / "results")
    imported = {"torch": True, "transformers": True, "deepspeed": False}
    recorder.record("latency", latency_found(engine="torch", imported=imported))
    assert json.loads(recorder.write().read_text())["imported"] == imported


def test_onnx_runtime_is_told_not_to_send_telemetry_before_it_is_loaded() -> None:
    code = "import sys, os, vlm.runtimes; print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.split() == ["1", "False"]
