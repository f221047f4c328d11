"""What can be asked about a scene with one word as the answer: shared by the families of questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.data.scenes.question import COUNTS
from vlm.data.scenes.scene import COLOURS, POSITIONS, SHAPES, SIZES, Scene, Thing

POOLS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "position": POSITIONS,
    "count": COUNTS,
}
# How a question asks for an attribute, "{}" standing for the thing.
ASKING = {
    "colour": "What color is the {}?",
    "shape": "What shape is the {}?",
    "size": "What size is the {}?",
    "position": "Where is the {}?",
}


@dataclass(frozen=True)
class Fact:
    """A question, its one-word answer and the kind of answer, whose pool in POOLS holds the wrong ones."""

    kind: str
    question: str
    answer: str

    def wrong(self, rng: random.Random) -> str:
        """Another answer of the same kind."""
        return rng.choice([word for word in POOLS[self.kind] if word != self.answer])


def attribute(thing: Thing, kind: str) -> str:
    """The word for a thing's colour, shape, size or position."""
    words = {"colour": thing.colour, "shape": thing.shape, "size": thing.size, "position": POSITIONS[thing.cell]}
    return words[kind]


def name(thing: Thing) -> str:
    """Colour and shape, which no two things of a scene share."""
    return f"{thing.colour} {thing.shape}"


def singled_out(scene: Scene, kind: str) -> list[Thing]:
    """The things whose colour (or other attribute) no other thing of the scene has."""
    words = [attribute(thing, kind) for thing in scene.things]
    return [thing for thing, word in zip(scene.things, words, strict=True) if words.count(word) == 1]


def attribute_fact(scene: Scene, rng: random.Random) -> Fact:
    """What color is the circle, what shape is the red object, where is the red circle: any thing, any attribute."""
    kind = rng.choice(("colour", "shape", "position", "at"))
    candidates = {"colour": singled_out(scene, "shape"), "shape": singled_out(scene, "colour")}.get(kind, [])
    if kind == "colour" and candidates:
        thing = rng.choice(candidates)
        return Fact(kind, ASKING[kind].format(thing.shape), thing.colour)
    if kind == "shape" and candidates:
        thing = rng.choice(candidates)
        return Fact(kind, ASKING[kind].format(f"{thing.colour} object"), thing.shape)
    thing = rng.choice(scene.things)
    if kind == "at":
        asked = rng.choice(("colour", "shape"))
        return Fact(asked, ASKING[asked].format(f"object at the {POSITIONS[thing.cell]}"), attribute(thing, asked))
    return Fact("position", ASKING["position"].format(name(thing)), POSITIONS[thing.cell])


def size_fact(scene: Scene, rng: random.Random) -> Fact:
    """What size is the red circle?"""
    thing = rng.choice(scene.things)
    return Fact("size", ASKING["size"].format(name(thing)), thing.size)


def count_fact(scene: Scene, rng: random.Random) -> Fact:
    """How many objects are there, all of them or those with one attribute; never none."""
    if rng.random() < 0.5:
        return Fact("count", "How many objects are there?", COUNTS[len(scene.things) - 1])
    kind = rng.choice(("colour", "size"))
    word = attribute(rng.choice(scene.things), kind)
    number = sum(attribute(thing, kind) == word for thing in scene.things)
    return Fact("count", f"How many {word} objects are there?", COUNTS[number - 1])


def relation_fact(scene: Scene, rng: random.Random) -> Fact | None:
    """Is the red circle left or right of (above or below) the blue star; None in a scene of one thing."""
    if len(scene.things) < 2:
        return None
    first, second = rng.sample(scene.things, 2)
    (row, column), (other_row, other_column) = divmod(first.cell, 3), divmod(second.cell, 3)
    sides: list[tuple[str, str, bool]] = []
    if column != other_column:
        sides.append(("left", "right", column < other_column))
    if row != other_row:
        sides.append(("above", "below", row < other_row))
    before, after, is_before = rng.choice(sides)
    joint = "left or right of" if before == "left" else "above or below"
    return Fact("relation", f"Is the {name(first)} {joint} the {name(second)}?", before if is_before else after)


def with_distractors(answer: str, pool: Sequence[str], number: int, rng: random.Random) -> tuple[str, ...]:
    """`number` options in random order, the answer among them, the others from the pool."""
    options = [answer, *rng.sample([word for word in pool if word != answer], number - 1)]
    rng.shuffle(options)
    return tuple(options)
