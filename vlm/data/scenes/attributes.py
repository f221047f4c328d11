"""What is in each of the nine cells, as class numbers: the labels the vision tower is trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlm.data.scenes.scene import COLOURS, SHAPES, SIZES, WORDS, Scene

IGNORE = -100
KINDS = ("word", "number")
# Number of classes per attribute; where a cell can be without the attribute, class 0 says so.
CLASSES = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "size": 1 + len(SIZES),
    "kind": 1 + len(KINDS),
    "word": len(WORDS),
    "tens": 10,
    "ones": 10,
}
WITH_EMPTY = ("shape", "colour", "size", "kind")


def cell_attributes(scene: Scene) -> dict[str, NDArray[np.int64]]:
    """Class numbers of every attribute in every cell.

    Returns:
        For each name in CLASSES an array [9]; IGNORE (-100) where the attribute is not defined in that cell.
    """
    labels = {name: np.full(9, 0 if name in WITH_EMPTY else IGNORE, dtype=np.int64) for name in CLASSES}  # [9]
    for thing in scene.things:
        labels["shape"][thing.cell] = 1 + SHAPES.index(thing.shape)
        labels["colour"][thing.cell] = 1 + COLOURS.index(thing.colour)
        labels["size"][thing.cell] = 1 + SIZES.index(thing.size)
    if scene.label is not None:
        cell, text = scene.label.cell, scene.label.text
        labels["kind"][cell] = 1 + KINDS.index(scene.label.kind)
        if scene.label.kind == "word":
            labels["word"][cell] = WORDS.index(text)
        else:
            labels["tens"][cell], labels["ones"][cell] = int(text[0]), int(text[1])
    return labels
