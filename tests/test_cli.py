"""The command line: every command, its exit code, and what it says."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pocketvlm import cli, doctor
from pocketvlm.console import exit_codes
from vlm.errors import CheckFailed, UserError

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "run": ["CONFIG", "key=value", "--json"],
    "distill": ["CONFIG", "key=value", "--json"],
    "convert": ["CHECKPOINT", "--to", "hf", "upstream", "--out", "--vision", "--json"],
    "export": ["CHECKPOINT", "--to", "--out", "--allow-drift", "--json"],
    "ask": ["ARTIFACT_OR_CHECKPOINT", "IMAGE", "QUESTION", "--json"],
    "bench": ["ARTIFACT...", "--device", "--tasks", "--out", "--json"],
    "eval": ["ARTIFACT_OR_CHECKPOINT", "--tasks", "--data", "--predictions", "--json"],
    "ablate": ["STUDY", "key=value", "--out", "--read-test-again", "--json"],
    "analyze": ["CHECKPOINT", "--scenes", "--images", "--question", "--layer", "--out", "--json"],
    "sensitivity": ["CHECKPOINT", "--out", "--scenes", "--bits", "--json"],
    "gate": ["NEW", "--baseline", "--max-drop", "--max-slowdown", "--ignore", "--json"],
    "report": ["RESULTS...", "--out", "--json"],
    "doctor": ["CONFIG", "key=value", "--out", "--json"],
}
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `pocketvlm ...` in this process; returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pocketvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(call: Cli, command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    assert [word for word in COMMANDS[command] if word not in out] == []


def test_help_takes_less_than_three_tenths_of_a_second_of_processor_time() -> None:
    code = "import os, pocketvlm.cli as c\ntry: c.app(['--help'])\nfinally: print('cpu', sum(os.times()[:2]))"
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert min(float(run.rpartition("cpu ")[2]) for run in runs) < 0.3


def test_python_m_pocketvlm_is_pocketvlm() -> None:
    command = [sys.executable, "-m", "pocketvlm", "--help"]
    assert "Usage: pocketvlm [OPTIONS]" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arguments", [("nonsense",), ("run",), ("bench", "x", "--iterations", "many", "--out", "y")])
def test_wrong_usage_is_exit_code_2_without_traceback(call: Cli, arguments: tuple[str, ...]) -> None:
    code, _, err = call(*arguments)
    assert code == 2 and "Error" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("x.yaml: wrong [key]"), 2, "error: x.yaml: wrong [key]"),
        (CheckFailed("drifted"), 1, "check failed: drifted"),
        (KeyboardInterrupt(), 130, "type the same command again to go on"),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (OSError(28, "No space left on device"), 2, "the disk is full"),
        (MemoryError(), 2, "out of memory"),
        (ZeroDivisionError("by zero"), 70, "internal error: ZeroDivisionError: by zero"),
    ],
)
def test_what_went_wrong_decides_the_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, exit_codes():
        raise error
    err = capsys.readouterr().err
    assert end.value.code == code
    assert said in err and "Traceback" not in err


def test_an_internal_error_leaves_its_traceback_in_the_named_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_codes():
        raise ZeroDivisionError
    named = re.search(r"(\S+pocketvlm-crash-\d+\.log)", capsys.readouterr().err)
    assert named is not None
    log = Path(named[1])
    assert "test_cli.py" in log.read_text()
    log.unlink()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, exit_codes(debug=True):
        raise ZeroDivisionError
    assert end.value.code == 70 and "Traceback" in capsys.readouterr().err


def test_ask_answers_with_timings(call: Cli, random_checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (120, 80), "red").save(picture)
    code, out, _ = call("ask", random_checkpoint, picture, "What colour?", "--max-new-tokens", 3, "--json")
    tree = json.loads(out)
    assert code == 0 and tree["engine"] == "torch" and len(tree["tokens"]) <= 3
    assert tree["timings"]["ttft_ms"] > 0


def test_export_of_an_unknown_format_lists_the_known_ones(call: Cli, random_checkpoint: Path, tmp_path: Path) -> None:
    code, _, err = call("export", random_checkpoint, "--to", "onxx:int4", "--out", tmp_path)
    assert code == 2 and "Did you mean 'onnx'?" in err


def test_eval_scores_answers_that_exist(call: Cli, tmp_path: Path) -> None:
    from device_bench.evaluate import grade, save_answers
    from device_bench.tasks.scenes import questions

    answers = tmp_path / "answers.jsonl"
    asked = questions(3)
    truths = [question.truth if isinstance(question.truth, str) else question.truth[0] for question in asked]
    save_answers([grade(question, truth) for question, truth in zip(asked, truths, strict=True)], answers)
    code, out, _ = call("eval", "--predictions", answers, "--json")
    assert code == 0 and json.loads(out)["accuracy"]["avg"]["score"] == 100.0


def test_bench_names_an_unknown_device_before_it_measures_on_another(call: Cli, tmp_path: Path) -> None:
    code, _, err = call("bench", tmp_path, "--device", "local", "--device", "locl", "--out", tmp_path / "out")
    assert code == 2 and err.startswith("error: unknown device 'locl'. Did you mean 'local'?")


@pytest.mark.parametrize(
    ("tasks", "said"), [("popee", "unknown task 'popee'. Did you mean 'pope'?"), ("", "--tasks: no benchmark is named")]
)
def test_eval_says_which_tasks_there_are(call: Cli, random_checkpoint: Path, tasks: str, said: str) -> None:
    code, _, err = call("eval", random_checkpoint, "--tasks", tasks)
    assert code == 2 and said in err


def test_eval_wants_a_model_or_predictions(call: Cli) -> None:
    code, _, err = call("eval")
    assert code == 2 and "--predictions FILE" in err


@pytest.mark.parametrize(
    ("new", "code", "state"), [(80.0, 0, "pass"), (60.0, 1, "regression"), (None, 2, "cannot judge")]
)
def test_gate_answers_by_exit_code(call: Cli, tmp_path: Path, new: float | None, code: int, state: str) -> None:
    baseline, report = tmp_path / "old.json", tmp_path / "new.json"
    for path, score in ((baseline, 80.0), (report, new)):
        interval = {"score": score, "n": 1000, "ci95": [(score or 0) - 1, (score or 0) + 1]}
        accuracy = None if score is None else {"avg": interval, "tasks": {}}
        path.write_text(json.dumps({"schema": 1, "models": {"student": {"accuracy": accuracy}}, "artifacts": []}))
    found, out, _ = call("gate", report, "--baseline", baseline, "--json")
    assert found == code and json.loads(out)["verdict"] == state


def test_report_of_nothing_is_a_user_error(call: Cli, tmp_path: Path) -> None:
    code, _, err = call("report", tmp_path / "none", "--out", tmp_path / "report")
    assert code == 2 and "no such folder" in err


def test_doctor_says_what_to_type(call: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ENGINES", {"onnx": "raise SystemExit('too old')"})
    monkeypatch.setattr(doctor, "PACKAGES", (("no-such", "no_such_module", "torch", ("onnx",)),))
    monkeypatch.chdir(ROOT)
    code, out, _ = call("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    assert code == 0 and findings["no-such"]["state"] == "note"
    assert ".[torch]" in findings["no-such"]["advice"]
    assert ".[torch]" in call("doctor")[1]  # brackets are no markup
    code, out, _ = call("doctor", "configs/tiny.yaml", "--json")
    findings = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    assert code == 2 and findings["no-such"]["state"] == "missing"
    assert findings["onnx"]["state"] == "missing" and findings["onnx"]["found"] == "too old"


def test_doctor_judges_by_the_run_that_would_be_typed(
    call: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "ENGINES", {})
    seen: list[tuple[object, Path]] = []
    monkeypatch.setattr(doctor, "_forecast", lambda run, folder: seen.append((run.export.targets, folder)) or [])
    monkeypatch.chdir(ROOT)
    call("doctor", "configs/tiny.yaml", "export.targets=[onnx:int8]", "--out", tmp_path)
    assert seen == [(["onnx:int8"], tmp_path)]


def test_doctor_forecasts_memory_disk_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ENGINES", {})
    monkeypatch.chdir(ROOT)
    forecasts = {
        finding.name: finding for finding in doctor.examine(Path("configs/tiny.yaml")) if finding.topic == "forecast"
    }
    if "input files" in forecasts:
        pytest.skip(forecasts["input files"].advice)
    assert set(forecasts) == {"memory", "disk", "time"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_every_command_takes_an_end_from_outside_for_an_interruption(
    call: Cli, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    cleaned = []
    before = signal.signal(number, signal.SIG_DFL)  # nohup may have ignored it for the tests themselves

    def command(**_: object) -> None:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(cli, "app", command)
    try:
        code, _, err = call("run")
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert (code, cleaned) == (130, [True]) and "type the same command again" in err
