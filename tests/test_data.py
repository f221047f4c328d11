"""The data of a stage: all that is missing is said at once, too long and broken records are left out and counted."""

import json
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from distill.data.config import Data, Recipe
from distill.data.quarantine import Quarantine
from distill.data.rows import Rows
from tests.llava_data import IMAGE, VISION, encoder, record, stage, write
from vlm.config import Config
from vlm.data import store
from vlm.errors import UserError
from vlm.manifest import Preprocessing

RECIPES = sorted((Path(__file__).parents[1] / "configs" / "data").glob("*.yaml"))
PREPROCESSING = Preprocessing(size=16)


def _rows(folder: Path, max_length: int = 4096, **changes: object) -> Rows:
    quarantine = Quarantine(folder / "quarantine", "s")
    return Rows(stage(folder, max_broken=1.0, **changes), encoder(max_length), quarantine)


def test_everything_that_is_missing_is_in_one_message(tmp_path: Path) -> None:
    write(tmp_path / "there", [record(0, "a")])
    parts = [
        {"name": "A", "records": "there/records.jsonl", "images": "there", "folders": ["coco/train2017", "gqa"]},
        {"name": "B", "records": "b.json", "images": "b"},
    ]
    with pytest.raises(UserError) as caught:
        _rows(tmp_path, root=str(tmp_path), parts=parts)
    said = str(caught.value)
    for wanted in ("A: ", "coco/train2017: no such image folder", "gqa", "b.json: no such records file", "/b: no such"):
        assert wanted in said
    assert "there/records.jsonl" not in said and "docs/data.md" in said


def test_wrong_counts_and_absent_images_of_all_parts_are_in_one_message(tmp_path: Path) -> None:
    for name, count in (("a", 10), ("b", 10), ("c", 96)):
        write(tmp_path / name, [record(number, "x") for number in range(count)])
    for file in (tmp_path / "b").glob("*.png"):
        file.unlink()
    parts = [{"name": n, "records": f"{n}/records.jsonl", "images": n, "count": 100} for n in "abc"]
    with pytest.raises(UserError) as caught:
        _rows(tmp_path, root=str(tmp_path), parts=parts)
    said = str(caught.value)
    assert "a: " in said and "10 records found, about 100 expected" in said
    assert "0-0.png: no such image; of 10 that were looked for 10 are missing" in said
    assert "c: " not in said


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_becomes_part_of_the_configuration(path: Path) -> None:
    parts = Recipe.load(path).parts
    assert all(part.count for part in parts)
    data = Data.model_validate({"kind": "llava", "recipe": str(path), "root": "/data"})
    assert data.parts == parts and data.all_parts()[0].records == f"/data/{parts[0].records}"
    assert Data.model_validate(data.model_dump()) == data


def test_the_recipes_are_the_papers() -> None:
    counts = {path.stem: [part.count or 0 for part in Recipe.load(path).parts] for path in RECIPES}
    assert sum(counts["mobilevlm_v2_pretrain"]) == 1_250_000
    assert len(counts["mobilevlm_v2_multitask"]) == 9
    assert sum(counts["mobilevlm_v2_multitask"]) == sum(counts["mobilevlm_v2_mix"]) == 3_670_000 - 1_250_000 + 2_000


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "llava"}, "needs `records`"),
        ({"kind": "llava", "records": "r", "images": "i", "parts": [{"name": "a", "records": "r", "images": "i"}]},
         "or instead"),
        ({"kind": "llava", "parts": [{"name": "a", "records": "r", "images": "i"}] * 2}, "two parts are named 'a'"),
        ({"kind": "llava", "recipe": "none.yaml"}, r"none\.yaml: no such configuration file"),
        ({"kind": "scene_captions", "count": 1, "batching": "packed"}, "batching: packed is for data of kind llava"),
    ],
)  # fmt: skip
def test_data_that_contradict_themselves_are_refused(tree: dict, message: str) -> None:
    class Run(Config):
        data: Data

    with pytest.raises(UserError, match=message):
        Run.parse({"data": tree}, "test")


def test_a_longer_record_is_left_out_and_counted_and_none_is_cut(tmp_path: Path) -> None:
    write(tmp_path, [record(0, "a" * 10), record(1, "a" * 11), record(2, "a" * 10, images=2), record(3, "b", images=0)])
    limit = len(_rows(tmp_path).item(0)[1])
    rows = _rows(tmp_path, max_length=limit)
    assert [rows.item(index)[1].images for index in range(len(rows))] == [(str(tmp_path / "0-0.png"),), ()]
    assert [len(rows.item(index)[1]) for index in range(2)] == [limit, -int(rows.lengths[1])]
    (sentence,) = rows.quarantine.report()
    assert sentence == (f"Stage s: 2 records were left out because they are longer than {limit} tokens (records 2).")


def test_images_stand_in_the_order_of_their_placeholders(tmp_path: Path) -> None:
    write(tmp_path, [record(0, "a"), record(1, "b", images=0), record(2, "c", images=2)])
    rows = Rows(stage(tmp_path), encoder(), Quarantine(tmp_path, "s"), PREPROCESSING)
    batch = rows.batch([rows[2], rows[1], rows[0]])
    assert [Path(image).name for image in batch["images"]] == ["2-0.png", "2-1.png", "0-0.png"]
    assert (batch["input_ids"] == IMAGE).sum(1).tolist() == [2 * VISION, 0, VISION]
    assert batch["keys"] == [("s", 2), ("s", 1), ("s", 0)]
    alone = [rows.batch([rows[index]])["pixels"] for index in (2, 0)]
    assert torch.equal(batch["pixels"], torch.cat(alone)) and len(batch["pixels"].unique()) > 3
    assert "pixels" not in rows.batch([rows[1]])


def test_a_pack_is_one_row_with_one_key_a_record(tmp_path: Path) -> None:
    write(tmp_path, [record(0, "a"), record(1, "bc", images=0), record(2, "d", images=2)])
    rows = _rows(tmp_path)
    batch = rows.batch([rows[(0, 1)], rows[(2,)]])
    assert batch["keys"] == [("s", 0), ("s", 1), ("s", 2)] and batch["input_ids"].shape[0] == 2


def test_a_broken_record_is_listed_before_the_training(tmp_path: Path) -> None:
    bad = [{"id": "r9"}, '{"id": ', {**record(3, "a"), "image": "../x.png"}]
    write(tmp_path, [record(0, "a"), *bad, record(4, "b")])
    rows = _rows(tmp_path)
    assert len(rows) == 2 and rows.total == 5
    reasons = {entry.record: entry.reason for entry in rows.quarantine.broken()}
    assert set(reasons) == {1, 2, 3}
    assert "no list of turns" in reasons[1] and "not JSON" in reasons[2] and "no path below" in reasons[3]
    with pytest.raises(UserError, match=r"3 of 5 records are broken, more than max_broken: 0\.5") as caught:
        Rows(stage(tmp_path, max_broken=0.5), encoder(), Quarantine(tmp_path, "t"))
    assert "no list of turns" in str(caught.value)


def test_half_a_character_and_a_path_that_no_disk_takes_cost_their_records_alone(tmp_path: Path) -> None:
    long = record(2, "a", name="x" * 5000)
    write(tmp_path, [record(0, "a")])
    lines = [record(0, "a"), record(1, "bad \ud83d half", images=0), long]
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    rows = _rows(tmp_path)
    assert [bool(rows[index][1].turns) for index in range(len(rows))] == [True, False]
    reasons = {entry.record: entry.reason for entry in rows.quarantine.broken()}
    assert "half of a character" in reasons[1] and "File name too long" in reasons[2]


def test_a_batch_lacks_the_record_whose_image_is_broken_and_it_is_counted_once(tmp_path: Path) -> None:
    write(tmp_path, [record(number, "a") for number in range(4)], broken=("2-0.png",))
    for _ in range(2):  # as after an interruption
        rows = _rows(tmp_path)
        assert rows.batch([rows[1], rows[2], rows[2]])["keys"] == [("s", 1)]
        assert rows.batch([rows[(1, 2, 3)]])["keys"] == [("s", 1), ("s", 3)]
        assert rows.batch([rows[2]])["keys"] == [("s", 3)]  # a batch must hold something
    (entry,) = rows.quarantine.broken()
    assert (entry.part, entry.record, entry.id, entry.path) == ("records", 2, "r2", str(tmp_path / "2-0.png"))
    assert entry.reason.startswith("not a readable image")
    (line,) = (json.loads(text) for text in rows.quarantine.file.read_text().split("\n") if text)
    assert set(line) == {"part", "record", "id", "path", "reason", "turns"}
    assert rows.quarantine.report()[0].startswith(
        "Stage s: 1 records are broken and were left out, the first is record 2"
    )


def test_too_many_broken_images_end_the_run(tmp_path: Path) -> None:
    names = tuple(f"{number}-0.png" for number in range(3))
    write(tmp_path, [record(number, "a") for number in range(10)], broken=names)
    rows = Rows(stage(tmp_path, max_broken=0.2), encoder(), Quarantine(tmp_path, "s"))
    rows.batch([rows[0], rows[1], rows[5]])
    with pytest.raises(UserError, match=r"3 of 10 records are broken, more than max_broken: 0\.2"):
        rows[2]


def test_data_workers_count_a_broken_image_once(tmp_path: Path) -> None:
    write(tmp_path, [record(number, "a") for number in range(8)], broken=("2-0.png", "5-0.png"))
    rows = _rows(tmp_path)
    for _ in range(2):
        loader = DataLoader(rows, batch_size=2, num_workers=2, collate_fn=rows.batch)
        keys = [key for batch in loader for key in batch["keys"]]
        assert [index for _, index in keys] == [0, 1, 3, 4, 6, 7]
    assert sorted(entry.record for entry in rows.quarantine.broken()) == [2, 5]
    other = Quarantine(tmp_path / "quarantine", "s", process=1)
    assert not other.add(rows.quarantine.broken()) and not other.file.exists()


def test_a_line_that_a_kill_cut_off_costs_no_other_line(tmp_path: Path) -> None:
    write(tmp_path, [record(number, "a") for number in range(3)], broken=("0-0.png", "2-0.png"))
    rows = _rows(tmp_path)
    rows[0]
    rows.quarantine.file.write_text(rows.quarantine.file.read_text()[:-10])
    rows = _rows(tmp_path)
    rows[2]
    assert [entry.record for entry in rows.quarantine.broken()] == [2]


def test_a_record_without_a_turn_that_fits_is_replaced_and_said(tmp_path: Path) -> None:
    data = {"kind": "scene_conversations", "count": 3}
    quarantine = Quarantine(tmp_path, "s")
    rows = Rows(stage(tmp_path).model_copy(update={"data": Data.model_validate(data)}), encoder(300), quarantine)
    lengths = [len(rows.item(index)[1].turns) for index in range(3)]
    (sentence,) = quarantine.report()
    lost = sum(entry.turns for entry in quarantine.entries().values())
    assert lost and all(lengths) and f"{lost} turns of 3 records were left out" in sentence
    rows = Rows(rows.stage, encoder(20), quarantine)
    with pytest.raises(UserError, match="Turns that are too long need a student with higher"):
        rows.batch([rows[0]])


def test_records_measured_by_several_processes_are_those_measured_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [record(number, "a" * number, images=number % 3) for number in range(9)] + [{"id": "r9"}])
    alone = _rows(tmp_path)

    def elsewhere(function: Any, jobs: list) -> list:
        """What a pool does, without its processes: jobs and results are sent as bytes."""
        return [pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(job))))) for job in jobs]

    monkeypatch.setattr(store, "BATCH", 2)
    monkeypatch.setattr(store, "_mapper", lambda count, processes: nullcontext(elsewhere))
    told = []
    changed = stage(tmp_path, cache=str(tmp_path / "other"), max_broken=1.0)
    together = Rows(
        changed, encoder(), Quarantine(tmp_path, "t"), progress=lambda what, share: told.append((what, share))
    )
    assert together.lengths.tolist() == alone.lengths.tolist()
    assert together.quarantine.broken() == alone.quarantine.broken() != []
    assert told[-1] == ("records: measuring the records", 1.0) and len(told) > 3
