"""`pocketvlm convert` and names of checkpoints: what a user types, and what is said when it is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from distill.config import DistillConfig
from distill.run import run
from pocketvlm import cli
from pocketvlm.stamps import input_files
from tests.upstream import save_clip, save_upstream
from vlm.errors import UserError
from vlm.models.checkpoint import load_checkpoint
from vlm.models.hub import locate

ROOT = Path(__file__).parents[1]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `pocketvlm ...` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["pocketvlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_there_and_back_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_clip(tmp_path / "clip")
    save_upstream(tmp_path / "up", "ldpnet", tmp_path / "clip")
    assert call(monkeypatch, "convert", tmp_path / "up", "--to", "hf", "--out", tmp_path / "hf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(tmp_path / "hf")
    assert call(monkeypatch, "convert", tmp_path / "hf", "--to", "upstream", "--out", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back/config.json").read_text())["mm_projector_type"] == "ldpnet"
    assert call(monkeypatch, "convert", tmp_path / "hf", "--to", "hf", "--out", tmp_path / "again") == 2
    assert "is not upstream's layout and needs no conversion" in capsys.readouterr().err


def test_what_was_trained_here_goes_to_upstream_with_the_name_of_a_clip(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("convert", random_checkpoint, "--to", "upstream", "--out", tmp_path / "up")
    assert call(monkeypatch, *arguments) == 2
    assert "Give the name or the folder of its CLIP with --vision" in capsys.readouterr().err
    assert call(monkeypatch, *arguments, "--vision", "openai/mine") == 0
    told = json.loads((tmp_path / "up/config.json").read_text())
    assert told["mm_vision_tower"] == "openai/mine" and told["vocab_size"] == 775


def test_a_name_that_is_no_folder_is_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, tuple(pattern for pattern in allow_patterns if "model" in pattern or "safe" in pattern)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate(Path("someone/model")) == tmp_path
    assert asked == [
        ("someone/model", ("*.model", "*.safetensors")),
        ("someone/model", ("*.model", "pytorch_model*.bin")),
    ]


def test_a_slip_of_the_pen_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=r"runs/studnet: no config\.json, so this is no checkpoint"):
        load_checkpoint(Path("runs/studnet"))


def unreachable(*_: object, **__: object) -> str:
    """A hub without a network."""
    raise huggingface_hub.errors.OfflineModeIsEnabled("offline")


def test_without_a_network_the_message_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"someone/model: no such folder .*, and as a name on the .* hub .*offline"):
        load_checkpoint(Path("someone/model"))


def test_a_distillation_asks_for_its_checkpoints_before_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    stage = {"name": "s", "data": {"kind": "scene_captions", "count": 1}, "steps": 1, "batch_size": 1}
    config = {"teacher": "checkpoints/tiny-teacher", "student": "x", "stages": [{**stage, "learning_rate": 1}]}
    with pytest.raises(UserError, match=rf"^checkpoints/tiny-teacher: no such folder \(looked in {tmp_path}\)"):
        run(DistillConfig.parse(config, "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_processes_that_ask_at_once_get_one_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_clip(tmp_path / "clip")
    save_upstream(tmp_path / "up", "ldpnetv2", tmp_path / "clip")
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))
    code = "import sys, pathlib, vlm.models.prepared as p; print(p.prepared(pathlib.Path(sys.argv[1]), print))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "up")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert {out.splitlines()[-1] for out, _ in ended} == {str(next((tmp_path / "cache").glob("up-*[!k]")))}
    assert sum("1.0 " in out for out, _ in ended) == 1  # one of them was told of a conversion


def test_a_name_on_the_hub_stands_for_itself_among_a_runs_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert input_files({"distill.teacher": "mtgv/one"}) != input_files({"distill.teacher": "mtgv/two"})
    with pytest.raises(UserError, match=r"distill\.data\.records: data/x\.json does not exist"):
        input_files({"distill.data.records": "data/x.json"})
