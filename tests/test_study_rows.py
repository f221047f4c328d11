"""The shipped studies are complete, and real rows of a seed share weights and batches."""

import json
from pathlib import Path

import pytest
import yaml

from distill.config import DistillConfig
from pocketvlm.study import pool
from pocketvlm.study.config import StudyConfig, slug
from pocketvlm.study.run import study
from tests import fake_study
from tests.test_study import ROOT, STAGE


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_studies_are_complete(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = StudyConfig.load(path)
    runs = [config.run_of(row, seed) for row in config.rows for seed in config.seeds]
    assert len({slug(row.name) for row in config.rows}) == len(config.rows) and len(runs) >= 5
    assert len({run.distill.model_dump_json(exclude={"seed"}) for run in runs}) == len(config.rows)


def test_real_rows_of_a_seed_share_weights_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill import run
    from distill.training import worker
    from tests.tiny import save_random_checkpoint

    def train(config: DistillConfig, run_dir: Path, on_progress: object) -> None:
        worker.train(config, run_dir / "student")

    monkeypatch.setattr(pool, "run", fake_study.run)  # all in this process, which has torch
    monkeypatch.setattr(run, "run", train)
    monkeypatch.chdir(ROOT)
    teacher = save_random_checkpoint(tmp_path / "teacher")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    stage = {**STAGE, "steps": 2, "learning_rate": 1e-3}
    distill = {"teacher": str(teacher), "student": {**sizes, "num_key_value_heads": 2}, "stages": [stage]}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"name": "real", "distill": {**distill, "logits": {}}}))
    rows = [{"name": "undistilled", "distill": {"logits": None}}, {"name": "distilled"}]
    tree = {"name": "real", "base": str(tmp_path / "base.yaml"), "rows": rows, "seeds": [1], "scenes": 1}
    path = tmp_path / "real.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = StudyConfig.load(path)
    result = study(config, path, tmp_path / "out", quiet=True)
    histories = [
        json.loads((Path(entry["seeds"][0]["folder"]) / "student" / "history.json").read_text())
        for entry in result["comparisons"]["steps"]
    ]
    first = [history["rows"][0]["terms"]["sup"]["value"] for history in histories]
    assert first[0] == pytest.approx(first[1], rel=1e-6) and histories[1]["terms"] == ["sup", "logits"]
