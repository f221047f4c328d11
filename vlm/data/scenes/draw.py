"""Draws a scene: 96x96 RGB, grey noisy background, every cell 32 pixels wide."""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm.data.scenes.scene import Scene

IMAGE_SIZE = 96
CELL = IMAGE_SIZE // 3
RGB = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 75, 220),
    "yellow": (235, 210, 40),
    "purple": (140, 50, 175),
    "brown": (125, 75, 30),
    "cyan": (50, 200, 215),
    "pink": (250, 135, 185),
}
RADIUS = {"small": 8, "large": 13}
FONT_SIZE = 15
INK = (20, 20, 20)
# More than this keeps the vision tower from learning shapes within minutes.
POSITION_JITTER = 2
COLOUR_JITTER = 15
NOISE = 8
# Stencils are drawn this many times larger and scaled down, which smooths their edges.
OVERSAMPLING = 4


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB 96x96, the same for the same scene."""
    rng = random.Random(f"draw {scene.seed}")
    grey = rng.randint(200, 250)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (grey, grey, grey))
    for thing in scene.things:
        red, green, blue = (_shift(value, rng) for value in RGB[thing.colour])
        image.paste((red, green, blue), _corner(thing.cell, rng), _shape_stencil(thing.shape, RADIUS[thing.size]))
    if scene.label is not None:
        image.paste(INK, _corner(scene.label.cell, rng), _text_stencil(scene.label.text))
    noise = np.random.default_rng(scene.seed).integers(-NOISE, NOISE + 1, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.int16)
    pixels = np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _shift(value: int, rng: random.Random) -> int:
    return max(0, min(255, value + rng.randint(-COLOUR_JITTER, COLOUR_JITTER)))


def _corner(cell: int, rng: random.Random) -> tuple[int, int]:
    """The jittered top left pixel of a cell."""
    row, column = divmod(cell, 3)
    across, down = (rng.randint(-POSITION_JITTER, POSITION_JITTER) for _ in range(2))
    return column * CELL + across, row * CELL + down


@cache
def _shape_stencil(shape: str, radius: int) -> Image.Image:
    """Coverage mask of a shape centred in a cell, mode L, 32x32."""
    side = CELL * OVERSAMPLING
    mask = Image.new("L", (side, side), 0)
    _draw_shape(ImageDraw.Draw(mask), shape, side / 2, radius * OVERSAMPLING)
    return mask.resize((CELL, CELL), Image.Resampling.BOX)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, centre: float, radius: float) -> None:
    box = (centre - radius, centre - radius, centre + radius, centre + radius)
    if shape == "circle":
        pen.ellipse(box, fill=255)
    elif shape == "ring":
        pen.ellipse(box, fill=255)
        _ellipse(pen, centre, centre, 0.58 * radius, fill=0)
    elif shape == "moon":
        pen.ellipse(box, fill=255)
        _ellipse(pen, centre + 0.55 * radius, centre - 0.1 * radius, 0.8 * radius, fill=0)
    elif shape == "square":
        inset = 0.1 * radius
        pen.rectangle((box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset), fill=255)
    elif shape == "cross":
        arm = 0.32 * radius
        pen.rectangle((centre - arm, box[1], centre + arm, box[3]), fill=255)
        pen.rectangle((box[0], centre - arm, box[2], centre + arm), fill=255)
    elif shape == "heart":
        _ellipse(pen, centre - 0.48 * radius, centre - 0.4 * radius, 0.53 * radius, fill=255)
        _ellipse(pen, centre + 0.48 * radius, centre - 0.4 * radius, 0.53 * radius, fill=255)
        pen.polygon(_around(centre, radius, [(-0.96, -0.2), (0.96, -0.2), (0, 1)]), fill=255)
    else:
        pen.polygon(_around(centre, radius, _corners(shape)), fill=255)


def _ellipse(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: int) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _around(centre: float, radius: float, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(centre + radius * x, centre + radius * y) for x, y in points]


def _corners(shape: str) -> list[tuple[float, float]]:
    """The corners of a polygon whose radius is 1."""
    if shape == "triangle":
        return [(0, -1), (-1, 0.9), (1, 0.9)]
    if shape == "diamond":
        return [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]
    if shape == "star":
        reach = [1.1 if corner % 2 == 0 else 0.42 for corner in range(10)]
        angles = [corner * math.pi / 5 for corner in range(10)]
        return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(reach, angles, strict=True)]
    raise ValueError(f"unknown shape {shape!r}: add it to _draw_shape or _corners")


@cache
def _text_stencil(text: str) -> Image.Image:
    """Coverage mask of a label centred in a cell, mode L, 32x32; Pillow's own font, so no machine draws another."""
    mask = Image.new("L", (CELL, CELL), 0)
    font = ImageFont.load_default(FONT_SIZE)
    ImageDraw.Draw(mask).text((CELL / 2, CELL / 2), text, font=font, fill=255, anchor="mm", stroke_width=0.5)
    return mask
