"""LLaVA-format records: what is read, and that a broken one is told apart with its reason."""

import json
from pathlib import Path

import pytest

from vlm.data.index import BrokenRecord, RecordFile
from vlm.data.llava import llava_record
from vlm.data.records import Record
from vlm.errors import UserError

ASKED = {"from": "human", "value": "<image>\nwhat"}
SAID = {"from": "gpt", "value": "red"}
TURNS = [ASKED, SAID]
TEXT = [{"from": "human", "value": "what"}, SAID]


def _human(value: str) -> list[dict]:
    return [{"from": "human", "value": value}, SAID]


def test_an_image_a_text_and_several_images_are_read() -> None:
    images = Path("images")
    first = llava_record({"id": 7, "image": "a/b.png", "conversations": TURNS + TEXT}, 0, images, "v1")
    assert first == Record("7", ("images/a/b.png",), (("<image>\nwhat", "red"), ("what", "red")), "v1", True)
    second = llava_record({"conversations": TEXT}, 1, images, "v1")
    assert (second.id, second.images, second.turns) == ("1", (), (("what", "red"),))
    row = {"image": ["a.png", "b.png"], "conversations": _human("is <image> like <image>?")}
    third = llava_record(row, 2, images, "v1")
    assert third.images == ("images/a.png", "images/b.png") and third.turns[0][0] == "is <image> like <image>?"


def test_a_placeholder_moves_to_the_front_as_upstream_moves_it() -> None:
    def question(value: str) -> str:
        return llava_record({"image": "a.png", "conversations": _human(value)}, 0, Path(), "v1").turns[0][0]

    assert question(" what is this?\n<image>") == "<image>\nwhat is this?"
    assert question("<image>") == "<image>"
    assert question("<image> a <image>") == "<image>\na"  # one image: upstream puts it once


def test_a_first_turn_of_gpt_is_left_out_as_upstream_does() -> None:
    assert llava_record({"conversations": [SAID, *TEXT]}, 0, Path(), "v1").turns == (("what", "red"),)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (5, "an object was expected, found int"),
        ({"id": "x"}, "`conversations` is no list"),
        ({"conversations": [*TEXT, SAID]}, "human and gpt must alternate"),
        ({"conversations": TEXT[:1]}, "human and gpt must alternate"),
        ({"conversations": [TEXT[0], {"from": "gpt"}]}, "a turn has no text"),
        ({"conversations": [TEXT[0], {"from": "gpt", "value": ""}]}, "an answer is empty"),
        ({"conversations": _human("")}, "a question is empty"),
        ({"conversations": _human("a ASSISTANT: b")}, "contains 'ASSISTANT:'"),
        ({"conversations": _human("a</s>")}, "contains '</s>'"),
        ({"conversations": TURNS}, "0 images and 1 placeholders"),
        ({"image": "a.png", "conversations": TEXT}, "1 images and 0 placeholders"),
        ({"image": ["a.png", "b.png"], "conversations": TURNS}, "2 images and 1 placeholders"),
        ({"image": "../secret.png", "conversations": TURNS}, "'../secret.png' is no path below"),
        ({"image": "/etc/secret.png", "conversations": TURNS}, "is no path below"),
        ({"image": 3, "conversations": TURNS}, "image 3 is no path below"),
        ({"image": [""], "conversations": TURNS}, "image '' is no path below"),
        ({"conversations": _human("bad \ud83d half")}, "half of a character"),
        ({"image": "\ud83d.png", "conversations": TURNS}, "is no path below"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_with_its_reason(row: object, reason: str) -> None:
    with pytest.raises(BrokenRecord) as caught:
        llava_record(row, 0, Path("images"), "v1")
    assert reason in str(caught.value)


def test_plain_takes_one_caption_and_no_placeholder_is_needed() -> None:
    row = {"image": "a.png", "conversations": TEXT}
    assert llava_record(row, 0, Path(), "plain").images == ("a.png",)
    with pytest.raises(BrokenRecord, match="2 questions"):
        llava_record({"image": "a.png", "conversations": TURNS + TURNS}, 0, Path(), "plain")


LINES = [
    {"deep": [[[[[["}"]]]]]]},
    {"id": "\u2028 one line\x85"},
    {"id": '"[{', "more": [[1, "a\\"], {"b": "]"}]},
    {"id": "\\"},
    [],
    "text",
    5,
]


@pytest.mark.parametrize("name", ["records.json", "spread.json", "records.jsonl", "unended.jsonl"])
def test_every_record_is_found_where_it_lies(tmp_path: Path, name: str) -> None:
    lines = [json.dumps(line, ensure_ascii=False) for line in LINES]
    texts = {
        "records.json": json.dumps(LINES),
        "spread.json": "\ufeff [ " + " ,\n".join(lines) + "\n]\n",
        "records.jsonl": "\n".join([*lines[:2], "", "  \r", *lines[2:]]) + "\n",
        "unended.jsonl": "\n".join(lines),
    }
    (tmp_path / name).write_text(texts[name], encoding="utf-8", newline="")
    records = RecordFile(tmp_path / name, tmp_path / "cache")
    assert list(records) == LINES


def test_an_index_is_used_again_and_built_anew_for_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text("[1]\n[2]\n")
    RecordFile(file, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "_build", lambda self, progress: pytest.fail("built again"))
        assert list(RecordFile(file, tmp_path / "cache")) == [[1], [2]]
    file.write_text("[1]\n[3]\n[4]\n")
    assert list(RecordFile(file, tmp_path / "cache")) == [[1], [3], [4]]


def test_a_record_that_is_not_json_is_broken_alone(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"id": 1}\n{"id": \n{"id": 3}\n')
    records = RecordFile(tmp_path / "r.jsonl", tmp_path / "cache")
    assert (records[0], records[2]) == ({"id": 1}, {"id": 3})
    with pytest.raises(BrokenRecord, match="not JSON"):
        records[1]


def test_an_empty_list_has_no_records(tmp_path: Path) -> None:
    for name, text in (("a.json", "[ ]"), ("b.jsonl", ""), ("c.jsonl", "\n\n")):
        (tmp_path / name).write_text(text)
        assert len(RecordFile(tmp_path / name, tmp_path / "cache")) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}', "a list of records was expected, found an object"),
        ("", "a list of records was expected, found nothing"),
        ('[{"id": 1', "it was cut off"),
        ('[{"id": "a', "it was cut off"),
        ("[1] 2", "something follows the list"),
    ],
)
def test_a_file_that_is_no_whole_list_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        RecordFile(tmp_path / "bad.json", tmp_path / "cache")
    assert "bad.json" in str(caught.value)
    with pytest.raises(UserError, match=r"no such data file\. Correct `records`"):
        RecordFile(tmp_path / "none.json", tmp_path / "cache")
