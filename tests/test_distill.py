"""Distillation end to end on tiny random models: nothing is lost by a kill, both students see the same batches."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from distill.build import build
from distill.config import DistillConfig, Stage
from distill.data.quarantine import Quarantine
from distill.data.rows import Rows
from distill.tower import train_tower
from distill.training import worker
from distill.training.processes import Processes
from distill.training.stages import Plan, train_stage
from distill.training.trainer import Clock, ProgressLines
from tests.tiny import save_random_checkpoint
from vlm.data.collator import IGNORE
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
        "logits": {"distance": "forward_kl", "weight": {"share": 0.3, "cap": 0.01}},
        "probe_steps": 2,
        "checkpoint_steps": 2,
        **changes,
    }  # fmt: skip
    return DistillConfig.parse(tree, "test")


@pytest.fixture(scope="module")
def straight(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student trained without interruption."""
    out = tmp_path_factory.mktemp("straight") / "student"
    worker.train(_config(teacher), out)
    return out


def _history(folder: Path) -> list[dict]:
    return list(json.loads((folder / "history.json").read_text())["rows"])


def test_killed_and_resumed_equals_straight(
    teacher: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(teacher)
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

    expected, resumed = (load_file(folder / "model.safetensors") for folder in (straight, tmp_path / "resumed"))
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name
    history = _history(straight)
    assert history == _history(tmp_path / "resumed")
    assert set(history[0]["terms"]) == {"sup", "attention", "vision", "logits"}
    assert all(term["grad_norm"] > 0 for row in history for term in row["terms"].values())


def test_an_automatic_weight_is_the_share_of_the_cross_entropys_gradient_up_to_the_cap(straight: Path) -> None:
    first, second = (row["terms"] for row in _history(straight)[:2])
    wanted = 0.3 * first["sup"]["grad_norm"] / first["attention"]["grad_norm"]
    assert second["attention"]["weight"] == pytest.approx(min(wanted, 30.0), rel=1e-5)
    assert second["logits"]["weight"] == pytest.approx(0.01, rel=1e-5)


def test_undistilled_starts_from_the_same_weights_and_sees_the_same_batches(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list]] = {}
    plain = Rows.batch
    for name, config in (("student", _config(teacher)), ("undistilled", _config(teacher).without_distillation())):
        seen[name] = []

        def record(self: Rows, items: list, into: list[list] = seen[name]) -> dict:
            into.append([key for key, _ in items])
            return plain(self, items)

        monkeypatch.setattr(Rows, "batch", record)
        worker.train(config, tmp_path / name)
    assert seen["student"] == seen["undistilled"] and len(seen["student"]) >= 8
    first = [json.loads((tmp_path / n / "history.json").read_text())["rows"][0] for n in seen]
    assert first[0]["terms"]["sup"]["value"] == pytest.approx(first[1]["terms"]["sup"]["value"], rel=1e-6)


def test_adapters_train_and_the_vision_tower_does_not(teacher: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, _, encoder = build(_config(teacher))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    stage = _config(teacher).stages[1]
    rows = Rows(stage, encoder, Quarantine(tmp_path, stage.name))
    plan = Plan(stage, rows, 5, 0, 5, tmp_path, tmp_path / "events")
    train_stage(module, _config(teacher), plan, Clock(tmp_path / "seconds"), Processes())
    after = module.state_dict()
    assert all(not torch.equal(before[n], after[n]) for n in before if n.startswith("adapters."))
    assert all(torch.equal(before[n], after[n]) for n in before if "vision_tower" in n)


def test_llavas_projector_and_grouped_queries_are_trained_and_distilled(tmp_path: Path) -> None:
    train_tower(tmp_path / "tower", steps=1, patch=8, held_out=32)
    sizes = {"projector": "mlp2x_gelu", "intermediate_size": 64, "num_key_value_heads": 1}
    large = {**sizes, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    small = {**sizes, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    alone = {"teacher": None, "vision": str(tmp_path / "tower")}
    worker.train(_config(tmp_path, student=large).without_distillation().model_copy(update=alone), tmp_path / "teacher")
    worker.train(_config(tmp_path / "teacher", student=small), tmp_path / "student")
    student = load_checkpoint(tmp_path / "student").model
    assert student.config.model_type == "llava" and student.config.image_seq_length == 12 * 12
    assert student.config.text_config.num_key_value_heads == 1
    terms = _history(tmp_path / "student")[0]["terms"]
    assert all(terms[name]["grad_norm"] > 0 for name in ("attention", "vision", "logits"))


def test_the_student_is_a_checkpoint_that_loads(straight: Path) -> None:
    assert load_checkpoint(straight).image_tokens == 144
    assert not (straight / "work").exists()


FIXED = {
    "attention": {"distance": "kl", "weight": {"fixed": 0.5}},
    "vision_tokens": {"weight": {"fixed": 2.0}},
    "logits": {"distance": "reverse_kl", "weight": {"fixed": 3.0}},
}


def _llava(folder: Path, records: list[tuple[bool, str, str]], template: str) -> Stage:
    """A stage of (with image?, question, answer) records."""
    Image.new("RGB", (96, 96), (200, 30, 30)).save(folder / "red.png")
    rows = [
        {
            "id": "same",
            "conversations": [{"from": "human", "value": "<image>\n" * image + q}, {"from": "gpt", "value": a}],
        }
        | ({"image": "red.png"} if image else {})
        for image, q, a in records
    ]
    (folder / "records.json").write_text(json.dumps(rows))
    data = {"kind": "llava", "records": str(folder / "records.json"), "images": str(folder), "template": template}
    data["cache"] = str(folder / "cache")
    return Stage(name="s", data=data, steps=1, batch_size=2, learning_rate=1e-3)


@pytest.mark.parametrize("template", ["v1", "plain"])
@pytest.mark.parametrize("image", [True, False])
def test_the_loss_is_the_weighted_sum_of_its_terms_and_padding_changes_nothing(
    teacher: Path, tmp_path: Path, template: str, image: bool
) -> None:
    module, _, encoder = build(_config(teacher, **FIXED))
    long, short = (image, "what is in the middle of the picture", "a small red circle"), (image, "what", "red")
    rows = Rows(_llava(tmp_path, [long, short], template), encoder, Quarantine(tmp_path, "s"))
    together, *alone = (module(**rows.batch(items)) for items in ([rows[0], rows[1]], [rows[0]], [rows[1]]))
    weights = {"sup": 1.0, "attention": 0.5, "vision": 2.0, "logits": 3.0}
    terms = {name: float(value.detach()) for name, value in together["terms"].items()}
    loss = float(together["loss"].detach())
    assert loss == pytest.approx(sum(weights[name] * value for name, value in terms.items()), rel=1e-5)
    answers = [int((rows.batch([rows[i]])["labels"] != IGNORE).sum()) for i in (0, 1)]
    for name in ("sup", "logits"):
        values = [float(batch["terms"][name].detach()) for batch in alone]
        expected = sum(n * value for n, value in zip(answers, values, strict=True)) / sum(answers)
        assert terms[name] == pytest.approx(expected, rel=1e-3)
    assert image or terms["attention"] == terms["vision"] == 0.0
    together["loss"].backward()
    gradients = [p.grad for p in module.student_parameters() if p.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients)


def test_teacher_and_student_that_do_not_fit_are_refused(teacher: Path, tmp_path: Path) -> None:
    other = save_random_checkpoint(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["image_seq_length"] = 100
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="number of image tokens is 144 of the teacher and 100 of the student"):
        build(_config(teacher, student=str(other)))
    config["image_seq_length"] = 144
    (other / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["<0x41>"], ids["<0x42>"] = ids["<0x42>"], ids["<0x41>"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="the id of the token '<0x41>' is"):
        build(_config(teacher, student=str(other)))


def test_a_layer_that_does_not_exist_is_refused(teacher: Path) -> None:
    for key in ("teacher_layers", "student_layers"):
        with pytest.raises(UserError, match=rf"attention.{key}: 2 found.*from 0 to 1"):
            build(_config(teacher, attention={key: [2]}))


def test_pictures_are_prepared_as_the_students_checkpoint_says(teacher: Path, tmp_path: Path) -> None:
    student = save_random_checkpoint(tmp_path / "student")
    file = student / "processor_config.json"
    processor = json.loads(file.read_text())
    processor["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    file.write_text(json.dumps(processor))
    assert build(_config(teacher, student=str(student)))[0].tower.preprocessing.mean == (0.1, 0.2, 0.3)
    assert build(_config(student))[0].tower.preprocessing.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Pretrain"}, "two stages are named 'pretrain'"),
        ({"name": "../finetune"}, "should match pattern"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"learning_rate": -1.0}, "greater than 0"),
        ({"data": {"kind": "scene_captions", "count": 8, "template": "v1"}}, "has the template plain, not v1"),
    ],
)
def test_a_stage_that_cannot_be_trained_is_refused(changes: dict, message: str) -> None:
    tree = _config(Path("x")).model_dump()
    tree["stages"][1] |= changes
    with pytest.raises(UserError, match=message):
        DistillConfig.parse(tree, "test")


def test_terms_without_a_teacher_are_an_error() -> None:
    with pytest.raises(UserError, match="need a `teacher`"):
        DistillConfig.parse({**_config(Path("x")).model_dump(), "teacher": None}, "test")


def test_the_clock_goes_on_where_a_killed_process_left_it(tmp_path: Path) -> None:
    first = Clock(tmp_path / "seconds")
    while first.seconds()["processor_seconds"] < 0.2:
        sum(range(10_000))
    first.note()
    wall, processor = Clock(tmp_path / "seconds").seconds().values()
    assert wall >= processor >= 0.2
