"""The offline teacher says what the live one says, is written in pieces by many, and is refused when it is stale."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from distill.build import build
from distill.config import DistillConfig
from distill.data.quarantine import Quarantine
from distill.data.rows import Rows
from distill.features import tower_probe
from distill.pair import facts_of
from distill.probe import find_positions
from distill.teacher import cache_writer
from distill.teacher.cache import CachedTeacher
from distill.teacher.cache_writer import CacheWriter
from distill.teacher.live import Teacher
from distill.teacher.signals import Batch
from distill.training.processes import Processes
from tests.llava_data import record, write
from tests.tiny import save_random_checkpoint
from vlm.errors import CheckFailed, UserError
from vlm.models.checkpoint import load_checkpoint, save_checkpoint

RECORDS = 7
TERMS: dict[str, Any] = {"attention": {}, "vision_tokens": {}, "logits": {}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher."""
    return save_random_checkpoint(tmp_path_factory.mktemp("teacher") / "checkpoint")


def _config(teacher: Path, folder: Path, **changes: Any) -> DistillConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    data = {"kind": "scene_conversations", "count": RECORDS}
    tree = {
        "teacher": str(teacher),
        "student": {**sizes, "num_attention_heads": 2, "num_key_value_heads": 2},
        "stages": [{"name": "s", "data": data, "steps": 1, "batch_size": 2, "learning_rate": 1e-3}],
        "cache": {"kind": "exact", "folder": str(folder / "cache"), "shard_records": 3, **changes.pop("cache", {})},
        "precision": "fp32",
        **(changes or TERMS),
    }
    return DistillConfig.parse(tree, "test")


class Alone(Processes):
    """One of several that need not wait for each other."""

    def wait(self) -> None:
        """Go on."""


class Setup:
    """A live module, its data, and the writer of its cache."""

    def __init__(self, config: DistillConfig, folder: Path) -> None:
        self.config = config
        self.module, tokenizer_folder, encoder = build(config)
        self.teacher = self.module.teacher
        assert isinstance(self.teacher, Teacher)
        stage = config.stages[0]
        self.rows = Rows(stage, encoder, Quarantine(folder, "s"))
        image = self.module.student.config.image_token_id
        self.writer = CacheWriter(config, self.teacher, self.module.tower, image, encoder.max_length)
        self.facts = facts_of(self.teacher.model, AutoTokenizer.from_pretrained(tokenizer_folder))
        self.data = [(stage, self.rows)]

    def write(self, who: Processes | None = None) -> CachedTeacher:
        """Write the cache."""
        probe = tower_probe(self.module.student)
        return self.writer.write(self.facts, probe, self.data, who or Processes(), lambda done, count: None)

    def losses(self, batches: list[list[Any]]) -> list[dict[str, float]]:
        """Terms and loss of some batches of records; a list among the records shares a row."""
        found = []
        for batch in batches:
            items = [self.rows[tuple(i)] if isinstance(i, list) else self.rows[i] for i in batch]
            outputs = self.module(**self.rows.batch(items))
            values = {name: float(value.detach()) for name, value in outputs["terms"].items()}
            found.append({**values, "loss": float(outputs["loss"].detach())})
        return found


def test_losses_with_the_exact_cache_are_the_live_teachers(teacher: Path, tmp_path: Path) -> None:
    setup = Setup(_config(teacher, tmp_path), tmp_path)
    batches = [[0, 1], [5, 2, 3], [6], [[4, 1], [0]]]  # other batches than those written, and records that share a row
    live = setup.losses(batches)
    setup.module.teacher = setup.write()
    for expected, found in zip(live, setup.losses(batches), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    again, _, _ = build(setup.config)
    assert isinstance(again.teacher, CachedTeacher)


def test_the_layers_and_blocks_of_the_ablations_are_cached(teacher: Path, tmp_path: Path) -> None:
    attention = {"block": "text_text", "teacher_layers": [0, -1], "student_layers": [0, 1]}
    setup = Setup(_config(teacher, tmp_path, attention=attention, vision_tokens={}), tmp_path)
    live = setup.losses([[0, 1], [2]])
    setup.module.teacher = setup.write()
    for expected, found in zip(live, setup.losses([[0, 1], [2]]), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_the_focus_has_the_first_layer_when_the_attention_term_of_two_has_faded_out(
    teacher: Path, tmp_path: Path
) -> None:
    attention = {"teacher_layers": [0, -1], "student_layers": [0, 1], "weight": {"until": 0.5}}
    setup = Setup(_config(teacher, tmp_path, attention=attention, vision_tokens={}), tmp_path)
    setup.module.progress = 0.75
    live = setup.losses([[0, 1]])
    assert set(live[0]) == {"sup", "vision", "loss"}
    setup.module.teacher = setup.write()
    for expected, found in zip(live, setup.losses([[0, 1]]), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_batch_without_the_block_has_no_attention_to_read(teacher: Path, tmp_path: Path) -> None:
    attention = {"block": "vision_vision"}
    setup = Setup(_config(teacher, tmp_path, attention=attention), tmp_path)
    cached = setup.write()
    ids, segments = torch.full((1, 5), 7), torch.ones(1, 5, dtype=torch.long)
    batch = Batch(ids, torch.arange(5)[None], segments, None, [], torch.zeros(0, 576, 32), [("s", 0)])
    where = find_positions(ids, segments, None, setup.module.student.config.image_token_id, "vision_vision")
    (block,) = cached.attention(batch, [0], where)
    assert block.shape == (1, cached.heads, 0, 0)


@pytest.mark.parametrize("terms", [TERMS, {"vision_tokens": {"focus_weight": 0}}])
def test_a_group_of_text_alone_is_cached(teacher: Path, tmp_path: Path, terms: dict[str, Any]) -> None:
    write(tmp_path, [record(0, "red"), record(1, "blue", images=0), record(2, "red", images=0)])
    data = {"kind": "llava", "records": str(tmp_path / "records.jsonl"), "images": str(tmp_path)}
    tree = _config(teacher, tmp_path, **terms).model_dump()
    tree["stages"][0] |= {"data": {**data, "cache": str(tmp_path / "index")}, "batch_size": 1}
    setup = Setup(DistillConfig.parse(tree, "test"), tmp_path)
    batches = [[0], [1], [2], [1, 2], [0, 1]]
    live = setup.losses(batches)
    setup.module.teacher = setup.write()
    for expected, found in zip(live, setup.losses(batches), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_the_writer_has_no_more_records_in_memory_than_a_training_process(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(teacher, tmp_path, logits={})
    stage = config.stages[0].model_copy(update={"batch_size": 4, "gradient_accumulation": 2})
    setup = Setup(config.model_copy(update={"stages": [stage]}), tmp_path)
    sizes, plain = [], CacheWriter.outputs
    monkeypatch.setattr(CacheWriter, "outputs", lambda self, *a: sizes.append(len(a[1])) or plain(self, *a))
    setup.write(Alone(rank=0, count=1))
    assert max(sizes) == 2
    sizes.clear()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(FileNotFoundError):
        setup.write(Alone(rank=0, count=2))
    assert max(sizes) == 1


def test_the_compact_cache_has_the_likeliest_tokens(teacher: Path, tmp_path: Path) -> None:
    cache = {"kind": "compact", "top_k": 700}
    setup = Setup(_config(teacher, tmp_path, cache=cache, logits={"distance": "forward_kl"}), tmp_path)
    live = setup.losses([[0, 1]])
    setup.module.teacher = setup.write()
    (found,) = setup.losses([[0, 1]])
    assert found["logits"] == pytest.approx(live[0]["logits"], rel=0.05)


def test_an_interrupted_cache_goes_on_and_several_processes_share_the_work(teacher: Path, tmp_path: Path) -> None:
    setup = Setup(_config(teacher, tmp_path), tmp_path)
    folder = tmp_path / "cache"
    folder.mkdir()
    with pytest.raises(FileNotFoundError):  # not the first process: it does not declare the cache complete
        setup.write(Alone(rank=1, local=1, count=2, here=2))
    assert sorted(path.name for path in folder.glob("s-*")) == ["s-000001.safetensors"]
    before = (folder / "s-000001.safetensors").stat().st_mtime_ns
    setup.write(Alone(rank=0, count=2, here=2))
    assert len(list(folder.glob("s-*.safetensors"))) == 3
    assert (folder / "s-000001.safetensors").stat().st_mtime_ns == before


def test_the_forecast_is_right_and_a_disk_that_is_too_small_is_refused(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(_config(teacher, tmp_path), tmp_path)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
        with pytest.raises(UserError, match=r"needs about .* GB more, the disk has 0\.0 GB free"):
            setup.write()
        forced = Setup(_config(teacher, tmp_path, cache={"force": True}), tmp_path)
        forced.write()
    written = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert forced.writer.forecast(forced.data) == pytest.approx(written, rel=0.1)


def test_a_stale_cache_is_refused_by_name(teacher: Path, tmp_path: Path) -> None:
    setup = Setup(_config(teacher, tmp_path), tmp_path)
    setup.write()
    other = save_random_checkpoint(tmp_path / "other", seed=1)
    changed = setup.config.model_dump()
    changed["stages"][0]["data"]["count"] += 1
    for tree, said in (
        (changed, "the data of stage s"),
        ({**setup.config.model_dump(), "precision": "bf16"}, "precision: fp32 found, bf16 expected"),
        ({**setup.config.model_dump(), "teacher": str(other)}, "the teacher"),
        ({**setup.config.model_dump(), "vision_tokens": None}, "vision_tokens: True found, False expected"),
    ):
        with pytest.raises(UserError, match=f"stale: {said}"):
            build(DistillConfig.parse(tree, "test"))


def test_a_cache_of_pictures_that_were_prepared_otherwise_is_refused(teacher: Path, tmp_path: Path) -> None:
    tree = {**_config(teacher, tmp_path).model_dump(), "student": str(teacher)}
    Setup(DistillConfig.parse(tree, "test"), tmp_path).write()
    cropped = tmp_path / "cropped"
    checkpoint = load_checkpoint(teacher)
    save_checkpoint(checkpoint.model, teacher, checkpoint.preprocessing.model_copy(update={"square": "crop"}), cropped)
    with pytest.raises(UserError, match=r"stale: how pictures are prepared: .*'pad'.* found, .*'crop'.* expected"):
        build(DistillConfig.parse({**tree, "student": str(cropped)}, "test"))


def test_what_is_not_the_teachers_is_found(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(_config(teacher, tmp_path), tmp_path)
    monkeypatch.setattr(cache_writer, "save_file", _spoil)
    with pytest.raises(CheckFailed, match=r"s-000000.safetensors: 0/answers is .*% away"):
        setup.write()
    assert not (tmp_path / "cache" / "cache.json").exists()


def _spoil(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Give each record another's answers."""
    save_file({name: value.flip(0) if name.endswith("answers") else value for name, value in tensors.items()}, file)


@pytest.mark.parametrize("term", ["vision_tokens", "vision_logits"])
def test_a_compact_cache_cannot_serve_the_other_terms(term: str) -> None:
    with pytest.raises(UserError, match="kind compact holds answers only"):
        _config(Path("x"), Path("y"), cache={"kind": "compact"}, logits={}, **{term: {}})


@pytest.mark.parametrize(
    ("terms", "message"),
    [({"switch": {}}, "switch asks the teacher"), ({"attention": {"block": "vision_text"}}, "zero everywhere")],
)
def test_what_no_cache_can_hold_is_refused(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _config(Path("x"), Path("y"), **terms)


@pytest.mark.parametrize("logits", [None, {}, {"tokens": "all"}])
def test_what_the_teacher_says_at_the_image_tokens_is_cached(
    teacher: Path, tmp_path: Path, logits: dict[str, Any] | None
) -> None:
    terms = {"vision_logits": {}, "vision_tokens": {"weighting": "instruction"}, "logits": logits}
    setup = Setup(_config(teacher, tmp_path, **terms), tmp_path)
    live = setup.losses([[0, 1], [5, 2, 3], [[4, 1], [0]]])
    setup.module.teacher = setup.write()
    for expected, found in zip(live, setup.losses([[0, 1], [5, 2, 3], [[4, 1], [0]]]), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_shards_are_readable_files(teacher: Path, tmp_path: Path) -> None:
    Setup(_config(teacher, tmp_path), tmp_path).write()
    names = load_file(tmp_path / "cache" / "s-000002.safetensors").keys()
    assert sorted(names) == ["6/answers", "6/attention/text_vision/000", "6/tokens"]
