"""What quantizers look at: questions about training scenes, or the user's own pictures and questions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from export.config import ExportConfig
from vlm.data.index import BrokenRecord, RecordFile
from vlm.data.llava import llava_record
from vlm.data.records import Record, load_image
from vlm.data.scenes.draw import render
from vlm.data.scenes.questions import benchmark_questions
from vlm.data.scenes.scene import make_scene
from vlm.errors import UserError
from vlm.folders import cache_folder
from vlm.prompts import IMAGE


@dataclass(frozen=True)
class Question:
    """A picture, a question about it and the right answer."""

    image: Image.Image
    text: str
    answer: str


Ask = Callable[[int], Iterator[Question]]  # at most so many


def scene_questions(count: int) -> Iterator[Question]:
    """Yield a question about each of the first training scenes: nothing is asked here that accuracy is measured on."""
    for seed in range(count):
        scene = make_scene(seed)
        questions = benchmark_questions(scene)
        question = questions[seed % len(questions)]
        yield Question(render(scene), question.prompt, question.answer)


def own_questions(records: Path, images: Path, count: int) -> Iterator[Question]:
    """Yield the first turn of each of the first records of a LLaVA-format file; each has one picture.

    Args:
        records: .json list or .jsonl.
        images: the folder that the records' image paths begin at.
        count: how many at most.
    Raises:
        UserError: there is no record, or one cannot be used; names the file, the record and what is wrong with it.
    """
    if not records.is_file():
        raise UserError(f"{records}: no such file. Correct --calibration-records (export.calibration_records).")
    rows = RecordFile(records, cache_folder() / "records")
    if not rows:
        raise UserError(f"{records}: no record in it, one with a picture and a question expected.")
    for number in range(min(count, len(rows))):
        try:
            record: Record = llava_record(rows[number], number, images, "v1")
        except BrokenRecord as error:
            raise UserError(f"{records}: record {number} cannot be used: {error}. Correct it.") from error
        if len(record.images) != 1:
            raise UserError(f"{records}: record {number} has {len(record.images)} pictures, one expected. Correct it.")
        text, answer = record.turns[0]
        yield Question(load_image(record.images[0]), text.replace(IMAGE, "").strip(), answer)


def questions(config: ExportConfig) -> Ask:
    """Whom a configuration lets ask."""
    if config.calibration_records is None or config.calibration_images is None:
        return scene_questions
    return partial(own_questions, Path(config.calibration_records), Path(config.calibration_images))
