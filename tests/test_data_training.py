"""Training on LLaVA-format data: grouped or packed, a killed and resumed run is the straight one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.build import build
from distill.config import DistillConfig
from distill.data.quarantine import Quarantine
from distill.data.rows import Rows
from distill.model import AlignKD
from distill.training import worker
from distill.training.trainer import ProgressLines
from pocketvlm.commands.distill import distill
from tests.llava_data import record, write
from tests.tiny import save_random_checkpoint
from vlm.errors import UserError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, teacher and student."""
    return save_random_checkpoint(tmp_path_factory.mktemp("teacher") / "checkpoint")


def _config(teacher: Path, data: Path, batching: str) -> DistillConfig:
    source = {"kind": "llava", "records": str(data / "records.jsonl"), "images": str(data), "batching": batching}
    source |= {"cache": str(data / "cache"), "max_broken": 0.2, "max_length": 400}
    stage = {"name": "s", "data": source, "steps": 8, "batch_size": 2, "learning_rate": 1e-3}
    terms: dict = {"attention": {}, "vision_tokens": {}, "logits": {}}
    tree = {"teacher": str(teacher), "student": str(teacher), "stages": [stage], "checkpoint_steps": 2, **terms}
    return DistillConfig.parse({**tree, "stop_dead_terms": False}, "test")


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_killed_and_resumed_equals_straight(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    rows = [record(number, "red " * (number % 4 + 1), images=number % 3 != 0) for number in range(9)]
    write(tmp_path, rows, broken=("4-0.png",))
    config = _config(teacher, tmp_path, batching)
    seen: dict[str, list] = {"straight": [], "resumed": []}
    plain_forward, plain_step = AlignKD.forward, ProgressLines.on_step_end

    def watch(name: str) -> None:
        def forward(self: AlignKD, **batch: Any) -> dict:
            seen[name].append(batch["keys"])
            return plain_forward(self, **batch)

        monkeypatch.setattr(AlignKD, "forward", forward)

    def interrupt(self: ProgressLines, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt
        plain_step(self, args, state, control, **kwargs)

    watch("straight")
    worker.train(config, tmp_path / "straight")
    watch("resumed")
    monkeypatch.setattr(ProgressLines, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        worker.train(config, tmp_path / "resumed")
    monkeypatch.setattr(ProgressLines, "on_step_end", plain_step)
    worker.train(config, tmp_path / "resumed")

    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in seen)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert len(seen["straight"]) == 8
    assert seen["resumed"] == seen["straight"][:7] + seen["straight"][6:]  # the last checkpoint was of step 6
    for name in seen:
        (line,) = (text for text in (tmp_path / name / "quarantine/s/0.jsonl").read_text().split("\n") if text)
        assert json.loads(line)["id"] == "r4"
        reports = json.loads((tmp_path / name / "history.json").read_text())["reports"]
        assert any("Stage s: 1 records are broken" in sentence for sentence in reports)


@pytest.mark.parametrize("distance", ["mse", "kl", "cosine"])
def test_a_packed_rows_terms_are_those_of_its_records_alone(teacher: Path, tmp_path: Path, distance: str) -> None:
    write(
        tmp_path, [record(0, "red"), record(1, "blue and red", images=0), record(2, "a", images=2), record(3, "blue")]
    )
    config = _config(teacher, tmp_path, "packed")
    changes = {"attention": {"distance": distance}, "vision_tokens": {}, "logits": {}}
    module, _, encoder = build(DistillConfig.parse({**config.model_dump(), **changes}, "test"))
    data = config.stages[0].data.model_copy(update={"max_length": None})
    rows = Rows(config.stages[0].model_copy(update={"data": data}), encoder, Quarantine(tmp_path, "s"))
    packed, single = rows.batch([rows[(0, 1, 2, 3)]]), rows.batch([rows[index] for index in range(4)])
    assert packed["input_ids"].shape[0] == 1 and single["input_ids"].shape[0] == 4
    found, expected = (module(**batch)["terms"] for batch in (packed, single))
    assert found.keys() == {"sup", "attention", "vision", "logits"}
    for name, value in expected.items():
        assert float(value.detach()) > 0
        torch.testing.assert_close(
            found[name], value, rtol=2e-3, atol=1e-6
        )  # the teacher's answers are kept as float16


def test_what_was_left_out_is_said_at_the_end(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [record(number, "red", images=number % 3) for number in range(9)], broken=("4-0.png",))
    file = tmp_path / "mine.yaml"
    file.write_text(_config(teacher, tmp_path, "random").dump())
    distill(file, out=tmp_path / "run", as_json=True)
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["checkpoint"] == str(tmp_path / "run" / "student")
    assert any("the first is record 4 of records" in sentence for sentence in outcome["reports"])


@pytest.mark.parametrize("steps", [20, 60])  # 20 are an epoch: the last broken image is met far from a logged step
def test_too_many_images_that_data_workers_cannot_open_end_the_run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    write(tmp_path, [record(n, "red") for n in range(40)], broken=tuple(f"{n}-0.png" for n in range(9)))
    tree = _config(teacher, tmp_path, "random").model_dump() | {"data_workers": 1, "log_steps": 100}
    tree["stages"][0]["steps"] = steps
    plain, done = AlignKD.forward, []
    monkeypatch.setattr(AlignKD, "forward", lambda self, **batch: done.append(1) or plain(self, **batch))
    with pytest.raises(UserError, match=r"9 of 40 records are broken, more than max_broken: 0\.2"):
        worker.train(DistillConfig.parse(tree, "test"), tmp_path / "run")
    assert len(done) <= 20


def test_what_a_data_worker_says_has_no_traceback(teacher: Path, tmp_path: Path) -> None:
    write(tmp_path, [record(n, "red") for n in range(3)], broken=tuple(f"{n}-0.png" for n in range(3)))
    tree = _config(teacher, tmp_path, "random").model_dump() | {"data_workers": 1}
    tree["stages"][0]["data"]["max_broken"] = 1.0
    with pytest.raises(UserError, match=r"^stage s: neither record \d nor .* repair or remove broken records\.$"):
        worker.train(DistillConfig.parse(tree, "test"), tmp_path / "run")
