"""What a training may use besides the plain way: LoRA, checkpointing, epochs, events; and how its end is said."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill import run as running
from distill.build import build
from distill.config import DistillConfig
from distill.data.quarantine import Quarantine
from distill.data.rows import Rows
from distill.kept import Kept
from distill.training import worker
from distill.training.forecast import forecast
from distill.training.processes import Processes
from distill.training.stages import stage_steps
from tests.tiny import save_random_checkpoint
from vlm.errors import CheckFailed, UserError
from vlm.models.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher."""
    return save_random_checkpoint(tmp_path_factory.mktemp("teacher") / "checkpoint")


def _config(teacher: Path, **changes: Any) -> DistillConfig:
    data = {"kind": "scene_captions", "count": 4}
    tree = {
        "teacher": str(teacher),
        "student": str(teacher),
        "stages": [{"name": "s", "data": data, "steps": 2, "batch_size": 2, "learning_rate": 1e-3}],
        "vision_tokens": {},
        "precision": "fp32",
        "log_steps": 1,
        **changes,
    }
    return DistillConfig.parse(tree, "test")


def test_a_loss_that_is_no_number_ends_the_run(teacher: Path, tmp_path: Path) -> None:
    stage = {"name": "s", "data": {"kind": "scene_captions", "count": 4}, "batch_size": 2, "steps": 6}
    config = _config(teacher, stages=[{**stage, "learning_rate": 1e30}], vision_tokens=None, max_grad_norm=1e30)
    with pytest.raises(CheckFailed, match=r"loss is nan at step .*Lower the learning rate \(1e\+30 in stage s\)"):
        worker.train(config, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def _curve(folder: Path) -> list[list[float]]:
    return list(json.loads((folder / "history.json").read_text())["curve"])


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed: '.[distill]'")
def test_lora_changes_the_layers_it_names_and_is_merged(teacher: Path, tmp_path: Path) -> None:
    config = _config(teacher, lora={"rank": 2, "targets": ["q_proj", "down_proj"]})
    worker.train(config, tmp_path / "student")
    before, after = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "student"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert before.keys() == after.keys()
    assert all("q_proj" in name or "down_proj" in name or "projector" in name for name in changed)
    assert any("q_proj" in name for name in changed) and any("projector" in name for name in changed)
    load_checkpoint(tmp_path / "student")
    with pytest.raises(UserError, match=r"lora.targets: the decoder has no linear layer 'wq'"):
        build(_config(teacher, lora={"targets": ["wq"]}))


def test_checkpointing_changes_no_loss_and_events_are_written(teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    attention = {"attention": {}, "logits": {}}
    worker.train(_config(teacher, **attention), tmp_path / "plain")
    worker.train(
        _config(teacher, **attention, gradient_checkpointing=True, tensorboard=True), tmp_path / "checkpointed"
    )
    plain, checkpointed = _curve(tmp_path / "plain"), _curve(tmp_path / "checkpointed")
    assert len(plain) == 2
    for (_, expected), (_, found) in zip(plain, checkpointed, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    assert list((tmp_path / "checkpointed" / "tensorboard" / "s").glob("events.*"))


def test_the_learning_rate_of_a_row_is_the_one_its_step_was_made_with(teacher: Path, tmp_path: Path) -> None:
    worker.train(_config(teacher, probe_steps=1), tmp_path / "student")
    rates = [row["lr"] for row in json.loads((tmp_path / "student" / "history.json").read_text())["rows"]]
    assert rates == [0.0, pytest.approx(1e-3)]  # one step of warm-up


def test_epochs_are_counted_in_steps(teacher: Path, tmp_path: Path) -> None:
    data = {"kind": "scene_captions", "count": 10}
    stage = {"name": "s", "data": data, "epochs": 1.5, "batch_size": 4, "learning_rate": 1e-3}
    config = _config(teacher, stages=[stage])
    rows = Rows(config.stages[0], build(config)[2], Quarantine(tmp_path, "s"))
    assert stage_steps(config, config.stages[0], rows, Processes()) == 4  # 1.5 times 3 batches
    with pytest.raises(UserError, match="either `steps` or `epochs`"):
        _config(teacher, stages=[{**stage, "steps": 3}])


def test_another_vision_tower_is_refused(teacher: Path, tmp_path: Path) -> None:
    other = save_random_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"do not fit together: the vision tower's .*% away from that of the teacher"):
        build(_config(teacher, student=str(other)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_student_from_a_checkpoint_trains_without_distillation_and_without_loading_the_teacher(teacher: Path) -> None:
    config = _config(teacher, student=str(teacher), undistilled=True)
    missing = config.model_copy(update={"teacher": "nowhere"})
    module, _, _ = build(missing.without_distillation())
    assert module.teacher is None


def test_a_quantized_teacher_needs_a_gpu(teacher: Path) -> None:
    with pytest.raises(UserError, match="teacher_bits: 4 found, but this machine has no GPU"):
        build(_config(teacher, teacher_bits=4))


def test_zero_splits_what_the_forecast_says(teacher: Path) -> None:
    config = _config(teacher)
    student = build(config)[0].student
    whole = forecast(config, config.stages[0], student, 100, Processes()).parts
    split = _config(teacher, zero={"stage": 3})
    parts = forecast(split, split.stages[0], student, 100, Processes(count=4, here=4)).parts
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert whole["gradients"] == 4 * trained and parts["gradients"] == trained
    assert parts["student"] == whole["student"] // 4 and parts["teacher"] == whole["teacher"] == 400


def test_a_group_that_was_cut_off_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "kept"
    values = {("s", n): torch.randn(n + 1, 3).half() for n in range(4)}
    kept = Kept(3, file)
    kept.add({key: values[key] for key in [("s", 0), ("s", 1)]})
    kept.add({key: values[key] for key in [("s", 2), ("s", 3)]})  # there is room for one
    whole = Kept(3, file)
    assert len(whole) == 3 and all(torch.equal(whole[key], values[key]) for key in list(values)[:3])
    file.write_bytes(file.read_bytes()[:-1])
    assert len(Kept(3, file)) == 2
    assert len(Kept(3, file)) == 2  # the rest was cut off


@pytest.mark.parametrize(("number", "said"), [(9, "was killed .signal 9.*ran out of memory"), (11, "SIGSEGV")])
def test_what_ended_a_training_is_said(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    suicide = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"]
    monkeypatch.setattr(running, "command", lambda *_: suicide)
    with pytest.raises(UserError, match=f"(?s){said}"):
        running.run(_config(teacher), tmp_path)
