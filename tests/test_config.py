"""Overrides reach every value of a configuration, and one that cannot says what to type."""

import json
from pathlib import Path

import pytest

from pocketvlm.commands import distill
from vlm.config import Config
from vlm.errors import UserError


class Stage(Config):
    steps: int
    rate: float = 1.0


class Run(Config):
    stages: list[Stage]
    name: str = "x"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("stages: [{steps: 1}, {steps: 2}]\n")
    return path


def test_an_override_reaches_an_item_of_a_list(file: Path) -> None:
    found = Run.load(file, ["stages.1.steps=10", "stages.0.rate=0.5", "name=y"])
    assert found.stages == [Stage(steps=1, rate=0.5), Stage(steps=10)] and found.name == "y"
    assert Run.load(file, ["stages=[]"]).stages == []


def test_the_layout_of_a_file_does_not_decide_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    stage = {"name": "s", "data": {"kind": "scene_captions", "count": 1}, "steps": 1, "batch_size": 1}
    path.write_text(json.dumps({"student": "x", "stages": [{**stage, "learning_rate": 1}]}))
    assert distill.load(path, None)[1] == "plain"


def test_a_file_of_another_kind_and_a_missing_key_are_one_line_each(file: Path) -> None:
    study = file.with_name("study.yaml")
    study.write_text("name: x\nrows: []\n")
    with pytest.raises(UserError, match=rf"^{study}: this is the file of a study\. Type: pocketvlm ablate {study}$"):
        Run.load(study)
    with pytest.raises(UserError, match=r"^x: 'stages' is missing\.$"):
        Run.parse({"name": "long" * 99}, "x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.2.steps=1", "'2' found .* a number from 0 to 1 expected"),
        ("stages.first.steps=1", "'first' found .* a number from 0 to 1 expected"),
        ("stages.0.steps.x=1", "'steps' is a single value"),
        ("stages.0.stepps=1", "unknown key 'stages.0.stepps'. Did you mean 'steps'"),
        ("stages", r"expected key=value, for example bench\.scenes=50"),
    ],
)
def test_an_override_that_cannot_be_is_explained(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Run.load(file, [override])
