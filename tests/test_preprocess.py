"""The pixels that devices compute are those of transformers' processor, with which the models were trained."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from vlm.errors import UserError
from vlm.manifest import CLIP_MEAN, CLIP_STD, Preprocessing
from vlm.preprocess import open_image, pixel_values

SIZE = 96
TOLERANCE = 1e-6  # measured: 0


def noise(width: int, height: int, mode: str) -> Image.Image:
    """A picture in which every pixel differs."""
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


@pytest.mark.parametrize("square", ["pad", "crop"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("shape", [(96, 96), (64, 64), (200, 200), (150, 110), (70, 131), (31, 400), (1, 5)])
def test_pixels_are_those_of_transformers(shape: tuple[int, int], mode: str, square: Literal["pad", "crop"]) -> None:
    processing = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    theirs = processing.LlavaImageProcessorPil(
        do_pad=square == "pad",
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    image = noise(*shape, mode)
    # A picture of one channel or with transparency becomes RGB on loading, as `open_image` does for training.
    expected = np.asarray(theirs(image.convert("RGB"), return_tensors="np")["pixel_values"])  # [1, 3, S, S]
    found = pixel_values(image, Preprocessing(size=SIZE, square=square))
    assert found.dtype == np.float32 and found.shape == expected.shape == (1, 3, SIZE, SIZE)
    assert float(np.abs(found - expected).max()) <= TOLERANCE


def test_the_border_of_a_wide_picture_is_the_pad_colour() -> None:
    found = pixel_values(Image.new("RGB", (96, 48), "white"), Preprocessing(size=SIZE))
    padding = (np.array((122, 116, 104), np.float32) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    assert found[0, :, 0, 0] == pytest.approx(padding, abs=1e-5)


def test_what_is_no_picture_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"x\.png: not a readable image .*Replace the file"):
        open_image(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"y\.png: no such image\. Give the path"):
        open_image(tmp_path / "y.png")
