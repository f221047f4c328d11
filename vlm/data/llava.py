"""One LLaVA-format record, read as upstream does.

{"id", "image"?: path or paths, "conversations": [{"from": "human" | "gpt", "value"}, ...]}
"""

from pathlib import Path, PurePosixPath
from typing import Any

from vlm.data.index import BrokenRecord
from vlm.data.records import Record
from vlm.prompts import IMAGE

ASKED, ENDED = " ASSISTANT: ", "</s>"  # what upstream's preprocess_v1 cuts a conversation at


def llava_record(row: Any, number: int, images: Path, template: str) -> Record:
    """Turn a parsed record into a sequential conversation.

    As upstream's `preprocess_multimodal`: in a turn with one placeholder the image comes first, then a line break; a
    first turn of gpt is left out. Unlike upstream, what upstream trains without its image or without a label (a
    conversation that its templates cannot cut at the answers) is refused.

    Args:
        row: the parsed JSON.
        number: place in the file; the id of a record that has none.
        images: folder that the image paths begin at.
        template: prompt template of the stage.
    Raises:
        BrokenRecord: the record cannot be used; the message says why.
    """
    if not isinstance(row, dict):
        raise BrokenRecord(f"an object was expected, found {type(row).__name__}")
    paths = row.get("image") or []
    paths = [paths] if isinstance(paths, str) else paths
    turns = _turns(row, several=len(paths) > 1 if isinstance(paths, list) else False)
    found = [_image(images, path) for path in paths] if isinstance(paths, list) else [_image(images, paths)]
    places = sum(question.count(IMAGE) for question, _ in turns)
    if template == "plain":
        if len(turns) != 1:
            raise BrokenRecord(f"{len(turns)} questions; the template plain has one caption and no question")
        places = max(places, len(found))  # the question is not shown: the images stand before the caption
    if places != len(found):
        raise BrokenRecord(f"{len(found)} images and {places} placeholders {IMAGE}")
    if template == "v1":
        _check_cuts(turns)
    return Record(str(row.get("id", number)), tuple(found), turns, template, sequential=True)


def _turns(row: dict[str, Any], several: bool) -> tuple[tuple[str, str], ...]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BrokenRecord("`conversations` is no list of turns")
    if turns[0].get("from") == "gpt":
        turns = turns[1:]
    speakers = [turn.get("from") for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise BrokenRecord(f"the turns are from {speakers}; human and gpt must alternate, human first, gpt last")
    if not all(isinstance(turn.get("value"), str) for turn in turns):
        raise BrokenRecord("a turn has no text in `value`")
    if not all(_encodes(turn["value"]) for turn in turns):
        raise BrokenRecord("a turn holds half of a character (a lone surrogate such as \\ud83d)")
    values = [_image_first(turn["value"], several) for turn in turns]
    if any(IMAGE in answer for answer in values[1::2]):
        raise BrokenRecord(f"an answer contains {IMAGE}")
    if not all(values[1::2]):
        raise BrokenRecord("an answer is empty")
    return tuple(zip(values[::2], values[1::2], strict=True))


def _image_first(value: str, several: bool) -> str:
    """A text with its placeholder in front; with several images of a record, several placeholders stay in place."""
    count = value.count(IMAGE)
    if count == 0 or (count > 1 and several):
        return value
    return f"{IMAGE}\n{value.replace(IMAGE, '').strip()}".strip()


def _check_cuts(turns: tuple[tuple[str, str], ...]) -> None:
    """See that upstream would cut the conversation where the answers begin and end; else it trains no label of it."""
    for question, answer in turns:
        if not question:
            raise BrokenRecord("a question is empty")
        for mark in (ASKED, ENDED):
            if mark in f" {question}{ASKED[:-1]}" or mark in f"{ASKED[-1]}{answer}":
                raise BrokenRecord(f"a turn contains {mark.strip()!r}, which separates turns")


def _image(images: Path, image: Any) -> str:
    path = PurePosixPath(image) if isinstance(image, str) and image and _encodes(image) else None
    if path is None or path.is_absolute() or ".." in path.parts:  # links inside the folder may lead elsewhere
        raise BrokenRecord(f"image {image!r} is no path below the image folder")
    return str(images / path)


def _encodes(text: str) -> bool:
    """Whether a tokenizer and a file system take it: JSON may hold half of a surrogate pair, which UTF-8 has not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
