"""Training records: an image reference and the turns about it, from the built-in scenes or from LLaVA-format files."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.scenes.question import DESCRIBE
from vlm.data.scenes.questions import caption, training_turns
from vlm.data.scenes.scene import check_training_seeds, make_scene
from vlm.errors import UserError
from vlm.preprocess import open_image

SCENES = "scenes:"


@dataclass(frozen=True)
class Record:
    """One image (None: text only) and its turns, each a (question, answer) pair asked of the image independently.

    Attributes:
        id: unique within the data set.
        image: a path, or "scenes:SEED" for a built-in drawing.
        turns: questions and answers; the answer is what the loss is taken on.
        template: name in vlm.prompts.TEMPLATES.
    """

    id: str
    image: str | None
    turns: tuple[tuple[str, str], ...]
    template: str


def load_image(reference: str) -> Image.Image:
    """Return the picture that a record or a benchmark sample refers to."""
    if reference.startswith(SCENES):
        from vlm.data.scenes.draw import render

        return render(make_scene(int(reference.removeprefix(SCENES))))
    return open_image(Path(reference))


class Records(Sequence[Record]):
    """`count` records, each made when it is asked for, so that a large data set costs no memory."""

    def __init__(self, count: int, make: Callable[[int], Record]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._make(index)


def scene_captions(start: int, count: int) -> Records:
    """The pretraining stage on the built-in scenes: one caption an image, prompt `plain`."""
    check_training_seeds(start, count)

    def make(index: int) -> Record:
        seed = start + index
        return Record(f"caption-{seed}", f"{SCENES}{seed}", (("", caption(make_scene(seed))),), "plain")

    return Records(count, make)


def scene_conversations(start: int, count: int, seed: int = 0) -> Records:
    """The multi-task stage on the built-in scenes: about 24 questions an image, every second one's caption too; `v1`.

    Args:
        start: seed of the first scene.
        count: number of scenes.
        seed: chooses which questions are asked.
    """
    check_training_seeds(start, count)

    def make(index: int) -> Record:
        number = start + index
        scene = make_scene(number)
        turns = [(turn.question, turn.answer) for turn in training_turns(scene, seed)]
        if number % 2 == 0:
            turns.append((DESCRIBE, caption(scene)))
        return Record(f"scene-{number}-{seed}", f"{SCENES}{number}", tuple(turns), "v1")

    return Records(count, make)


def read_llava(path: Path, images: Path, template: str) -> Sequence[Record]:
    """Read LLaVA-format records: [{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}]}].

    Args:
        path: a .json list or .jsonl file.
        images: folder below which the images lie.
        template: prompt template of the stage.
    Raises:
        UserError: the file is missing or damaged, a conversation does not alternate, an image path leaves `images`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such data file. Correct `records` of the stage's data.")
    try:
        text = path.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON ({error}). A .jsonl file has one record a line, any other is one list of records; "
            "repair the file or copy it again."
        ) from error
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: a list of records was expected, found {type(rows).__name__}. Put the records into one list."
        )
    return [_record(path, images, template, index, row) for index, row in enumerate(rows)]


def _record(path: Path, images: Path, template: str, index: int, row: Any) -> Record:
    name = f"{path}: record {index}"
    if not isinstance(row, dict):
        raise UserError(f"{name}: an object was expected, found {type(row).__name__}. Repair or remove the record.")
    name, turns = f"{name} ({row.get('id')!r})", row.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{name}: `conversations` is no list of turns. Repair or remove the record.")
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"] * (len(turns) // 2):
        raise UserError(
            f"{name}: the turns are from {speakers}; human and gpt must alternate, human first, gpt last. "
            "Repair or remove the record."
        )
    if not all(isinstance(turn.get("value"), str) for turn in turns):
        raise UserError(f"{name}: a turn has no text in `value`. Repair or remove the record.")
    values = [turn["value"].replace("<image>", "").strip("\n") for turn in turns]
    pairs = tuple(zip(values[::2], values[1::2], strict=True))
    return Record(str(row.get("id", index)), _image(name, images, row.get("image")), pairs, template)


def _image(name: str, images: Path, image: Any) -> str | None:
    if not image:
        return None
    if not isinstance(image, str) or not (images / image).resolve().is_relative_to(images.resolve()):
        raise UserError(
            f"{name}: image {image!r} is no path below {images}. Correct the record, or `images` of the stage's data."
        )
    return str((images / image).resolve())
