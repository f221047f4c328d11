"""LLaVA-format records: what is read, and that a damaged file is named with what to do."""

import json
from pathlib import Path

import pytest

from vlm.data.records import Record, read_llava
from vlm.errors import UserError

TURNS = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]


def _write(folder: Path, rows: object, name: str = "records.json") -> Path:
    text = "\n".join(json.dumps(row) for row in rows) if name.endswith("l") else json.dumps(rows)  # type: ignore[attr-defined]
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_records_with_and_without_image_are_read(tmp_path: Path, name: str) -> None:
    rows = [{"id": 7, "image": "a/b.png", "conversations": TURNS * 2}, {"conversations": TURNS}]
    first, second = read_llava(_write(tmp_path, rows, name), tmp_path / "images", "plain")
    image = str((tmp_path / "images" / "a" / "b.png").resolve())
    assert first == Record("7", image, (("what", "red"), ("what", "red")), "plain")
    assert (second.id, second.image, len(second.turns)) == ("1", None, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"id": 1}, "a list of records was expected, found dict"),
        ([5], "record 0: an object was expected, found int"),
        ([{"id": "x"}], r"record 0 \('x'\): `conversations` is no list"),
        ([{"conversations": TURNS[::-1]}], "human and gpt must alternate"),
        ([{"conversations": TURNS[:1]}], "human and gpt must alternate"),
        ([{"conversations": [TURNS[0], {"from": "gpt"}]}], "a turn has no text"),
        ([{"image": "../secret.png", "conversations": TURNS}], "'../secret.png' is no path below"),
        ([{"image": 3, "conversations": TURNS}], "image 3 is no path below"),
    ],
)
def test_a_wrong_record_is_named_with_the_next_step(tmp_path: Path, rows: object, message: str) -> None:
    file = _write(tmp_path, rows)
    with pytest.raises(UserError, match=message) as caught:
        read_llava(file, tmp_path / "images", "v1")
    assert str(file) in str(caught.value)
    assert any(step in str(caught.value) for step in ("Repair or remove", "Correct", "Put the records"))


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such data file\. Correct `records`"):
        read_llava(tmp_path / "none.json", tmp_path, "v1")
    (tmp_path / "bad.json").write_text('[{"id": 1')
    with pytest.raises(UserError, match=r"bad.json: not JSON .* repair the file"):
        read_llava(tmp_path / "bad.json", tmp_path, "v1")
