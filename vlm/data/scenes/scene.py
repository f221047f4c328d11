"""What a scene holds: 1-4 coloured things and perhaps a written label, each in its own cell of a 3x3 grid."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from vlm.errors import UserError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart", "moon")
COLOURS = ("red", "green", "blue", "yellow", "purple", "brown", "cyan", "pink")
SIZES = ("small", "large")
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
WORDS = (
    "cat", "dog", "sun", "bus", "key", "map", "pen", "hat", "cup", "fox",
    "jam", "net", "leg", "van", "yak", "box", "car", "bed", "pig", "owl",
)  # fmt: skip

# A few combinations occur more often than the others, so that "popular" means something in POPE's popular setting.
POPULAR = tuple(zip(SHAPES, COLOURS, strict=False))
POPULAR_SHARE = 0.3
LABEL_SHARE = 0.75
MAX_THINGS = 4

# First seeds of the splits; training scenes start at 0. A scene is its seed, so disjoint ranges are disjoint splits.
VALIDATION_START = 900_000
TEST_START = 950_000
TOWER_START = 2_000_000


def check_training_seeds(start: int, count: int) -> None:
    """Keep held-out scenes, those from VALIDATION_START to TOWER_START, out of training data.

    Args:
        start: seed of the first training scene.
        count: number of scenes.
    Raises:
        UserError: a seed is held out.
    """
    if start < TOWER_START and start + count > VALIDATION_START:
        raise UserError(
            f"training scenes {start} to {start + count - 1}: those from {VALIDATION_START} to {TOWER_START - 1} are "
            f"held out for validation and test. Lower start or count, or start from {TOWER_START} on."
        )


@dataclass(frozen=True)
class Thing:
    """One drawn shape; `cell` is 0-8, row by row from the top left."""

    cell: int
    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Label:
    """A 3-letter word or a 2-digit number written in a cell."""

    cell: int
    kind: Literal["word", "number"]
    text: str


@dataclass(frozen=True)
class Scene:
    """A seed and all that is drawn from it; things are sorted by cell and have distinct (shape, colour) pairs."""

    seed: int
    things: tuple[Thing, ...]
    label: Label | None


def make_scene(seed: int, *, crowded: bool = False) -> Scene:
    """The scene of a seed, the same on every machine.

    Args:
        seed: which scene, 0 or more; VALIDATION_START, TEST_START and TOWER_START begin splits.
        crowded: fill eight cells with things, which shows the vision tower three times as many per picture; such
            scenes are for training the tower alone.
    """
    rng = random.Random(f"scene {seed}")
    number = 8 if crowded else rng.randint(1, MAX_THINGS)
    cells = rng.sample(range(9), number + 1)
    looks: list[tuple[str, str]] = []
    while len(looks) < number:
        popular = rng.random() < POPULAR_SHARE
        look = rng.choice(POPULAR) if popular else (rng.choice(SHAPES), rng.choice(COLOURS))
        if look not in looks:
            looks.append(look)
    things = [Thing(cell, *look, rng.choice(SIZES)) for cell, look in zip(cells, looks, strict=False)]
    label = _make_label(cells[number], rng) if rng.random() < LABEL_SHARE else None
    return Scene(seed, tuple(sorted(things, key=lambda thing: thing.cell)), label)


def _make_label(cell: int, rng: random.Random) -> Label:
    if rng.random() < 0.5:
        return Label(cell, "word", rng.choice(WORDS))
    return Label(cell, "number", str(rng.randint(10, 99)))
