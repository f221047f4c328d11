"""Distillation end to end on tiny random models: nothing is lost by a kill, both students see the same batches."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill import worker
from distill.config import DistillConfig
from distill.trainer import ProgressLines
from tests.tiny import save_random_checkpoint
from vlm.errors import UserError
from vlm.models.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher, wider than the student."""
    return save_random_checkpoint(tmp_path_factory.mktemp("teacher") / "checkpoint")


def _config(teacher: Path, **changes: object) -> DistillConfig:
    tree = {
        "teacher": str(teacher),
        "student": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        "stages": [
            {"name": "pretrain", "data": {"kind": "scene_captions", "count": 8}, "steps": 3, "batch_size": 2,
             "learning_rate": 1e-3},
            {"name": "finetune", "data": {"kind": "scene_conversations", "count": 8}, "steps": 5, "batch_size": 2,
             "learning_rate": 1e-3},
        ],
        "attention": {"distance": "cosine", "weight": {"share": 0.3}},
        "vision_tokens": {},
        "logits": {"distance": "forward_kl"},
        "probe_steps": 2,
        "checkpoint_steps": 2,
        **changes,
    }  # fmt: skip
    return DistillConfig.parse(tree, "test")


def test_killed_and_resumed_equals_straight(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(teacher)
    worker.train(config, tmp_path / "straight")

    plain = ProgressLines.on_step_end

    def interrupt(self: ProgressLines, args: object, state: object, control: object, **kwargs: object) -> None:
        if self.stage == "finetune" and state.global_step == 4:
            raise KeyboardInterrupt
        plain(self, args, state, control, **kwargs)

    monkeypatch.setattr(ProgressLines, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        worker.train(config, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    monkeypatch.setattr(ProgressLines, "on_step_end", plain)
    worker.train(config, tmp_path / "resumed")

    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
    histories = [json.loads((tmp_path / name / "history.json").read_text())["rows"] for name in ("straight", "resumed")]
    assert histories[0] == histories[1]
    assert set(histories[0][0]["terms"]) == {"sup", "attention", "vision", "logits"}
    assert all(term["grad_norm"] > 0 for row in histories[0] for term in row["terms"].values())


def test_undistilled_starts_from_the_same_weights_and_sees_the_same_batches(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list[str]]] = {}
    plain = worker.batch_of
    for name, config in (("student", _config(teacher)), ("undistilled", _config(teacher).without_distillation())):
        seen[name] = []

        def record(items: list, into: list[list[str]] = seen[name]) -> dict:
            into.append([key for key, _ in items])
            return plain(items)

        monkeypatch.setattr(worker, "batch_of", record)
        worker.train(config, tmp_path / name)
    assert seen["student"] == seen["undistilled"] and len(seen["student"]) >= 8
    first = [json.loads((tmp_path / n / "history.json").read_text())["rows"][0] for n in seen]
    assert first[0]["terms"]["sup"]["value"] == pytest.approx(first[1]["terms"]["sup"]["value"], rel=1e-6)


def test_adapters_train_and_the_vision_tower_does_not(teacher: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, _, encoder = worker.build(_config(teacher))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    stage = _config(teacher).stages[1]
    worker.train_stage(module, _config(teacher), stage, encoder, tmp_path, 0, 5)
    after = module.state_dict()
    assert all(not torch.equal(before[n], after[n]) for n in before if n.startswith("adapters."))
    assert all(torch.equal(before[n], after[n]) for n in before if "vision_tower" in n)


def test_the_student_is_a_checkpoint_that_loads(teacher: Path, tmp_path: Path) -> None:
    worker.train(_config(teacher), tmp_path / "student")
    checkpoint = load_checkpoint(tmp_path / "student")
    assert checkpoint.image_tokens == 144
    assert not (tmp_path / "student" / "work").exists()


def test_terms_without_a_teacher_are_an_error() -> None:
    with pytest.raises(UserError, match="need a `teacher`"):
        DistillConfig.parse({**_config(Path("x")).model_dump(), "teacher": None}, "test")
