"""From a picture to pixel values as CLIP wants them: made square, resized, normalised. NumPy and Pillow only.

Equals transformers' `LlavaImageProcessor` with and without `do_pad` (tests/test_preprocess.py); devices run this one.
"""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm.errors import UserError
from vlm.manifest import Preprocessing


def open_image(path: Path) -> Image.Image:
    """Read a picture as RGB.

    Raises:
        UserError: the file is missing, truncated or no picture; the message names it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such image. Give the path of a picture.")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error}). Replace the file.") from error


def pixel_values(image: Image.Image, how: Preprocessing) -> np.ndarray:
    """Return the normalised pixels of a picture.

    Args:
        image: any size, any mode.
        how: the artifact's or checkpoint's preprocessing.
    Returns:
        float32, [1, 3, size, size].
    """
    image = image.convert("RGB")
    image = _pad(image, how) if how.square == "pad" else image
    short = min(image.size)
    if short != how.size:
        size = (how.size * image.width // short, how.size * image.height // short)
        image = image.resize(size, Image.Resampling[how.resampling.upper()])
    left, top = (image.width - how.size) // 2, (image.height - how.size) // 2
    image = image.crop((left, top, left + how.size, top + how.size))
    scaled = np.asarray(image, dtype=np.float32) / 255.0  # [S, S, 3]
    pixels: np.ndarray = (scaled - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)  # [S, S, 3]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])  # [1, 3, S, S]


def _pad(image: Image.Image, how: Preprocessing) -> Image.Image:
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), how.pad_colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
