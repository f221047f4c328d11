"""Training records: image references and the turns about them; the built-in scenes' records are made here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm.data.scenes.question import DESCRIBE
from vlm.data.scenes.questions import caption, training_turns
from vlm.data.scenes.scene import check_training_seeds, make_scene
from vlm.preprocess import open_image

SCENES = "scenes:"


@dataclass(frozen=True)
class Record:
    """Images (none: text only) and the turns about them, each a (question, answer) pair.

    Attributes:
        id: unique within its file or the scenes.
        images: paths, or "scenes:SEED" for a built-in drawing.
        turns: questions and answers; the answer is what the loss is taken on.
        template: name in vlm.prompts.TEMPLATES.
        sequential: whether a turn goes on from the ones before it, as in LLaVA's conversations; then `<image>` in the
            questions says where each image stands. The scenes' turns are independent questions about one image, which
            stands where the template puts it.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    template: str
    sequential: bool = False


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
        return Record(f"caption-{seed}", (f"{SCENES}{seed}",), (("", caption(make_scene(seed))),), "plain")

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
        return Record(f"scene-{number}-{seed}", (f"{SCENES}{number}",), tuple(turns), "v1")

    return Records(count, make)
