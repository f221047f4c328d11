"""How a checkpoint wants its pictures, in transformers' files: read from them and written to them."""

import json
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlm.errors import UserError
from vlm.manifest import CLIP_MEAN, CLIP_STD, Preprocessing

_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# Newer and older transformers; the newer nests what the older has at the top.
PREPROCESSOR = "preprocessor_config.json"
_FILES = ("processor_config.json", PREPROCESSOR)


def read_preprocessing(folder: Path, size: int) -> Preprocessing:
    """Read how the pictures of a checkpoint are prepared.

    Args:
        folder: holds processor_config.json (with "image_processor") or preprocessor_config.json.
        size: of the vision tower's input, pixels per side.
    Raises:
        UserError: neither is there, or the picture would be prepared in a way that is not supported.
    """
    for name in _FILES:
        file = folder / name
        if file.is_file():
            try:
                tree = json.loads(file.read_text())
            except ValueError as error:
                raise UserError(f"{file}: not JSON ({error}). Copy the checkpoint again.") from error
            values = tree.get("image_processor") if name == _FILES[0] else tree
            if values:
                return _parse(values, size, file)
    raise UserError(
        f"{folder}: neither {' with image_processor nor '.join(_FILES)} found, so it is not known how pictures are to "
        "be prepared. Copy it from the published checkpoint, or from its CLIP."
    )


def _parse(values: dict[str, Any], size: int, file: Path) -> Preprocessing:
    pad = bool(values.get("do_pad"))
    crop = not pad and values.get("do_center_crop", True)
    side = _side(values.get("size", size))
    final = _side(values.get("crop_size", side)) if values.get("do_center_crop", True) else side
    steps = ("do_resize", "do_rescale", "do_normalize")
    wrong = [f"{step} false" for step in steps if not values.get(step, True)]
    if not (pad or crop):
        wrong.append("neither do_pad nor do_center_crop, which distorts the picture")
    if side != size or final != size:
        wrong.append(f"{side} pixels, cut to {final}, where the vision tower takes {size}")
    if values.get("resample", 3) not in _RESAMPLING:
        wrong.append(f"resample {values['resample']}")
    if wrong:
        raise UserError(
            f"{file}: {'; '.join(wrong)}: not supported. Pictures are padded (do_pad) or cropped (do_center_crop) to a "
            f"square, resized to {size} pixels with bicubic (3) or bilinear (2) resampling, scaled and normalised."
        )
    mean, std = tuple(values.get("image_mean", CLIP_MEAN)), tuple(values.get("image_std", CLIP_STD))
    return Preprocessing(
        size=size,
        mean=mean,
        std=std,
        pad_colour=pad_colour(mean),
        resampling="bilinear" if values.get("resample", 3) == 2 else "bicubic",
        square="pad" if pad else "crop",
    )


def _side(size: Any) -> Any:
    """Pixels of a side from one of transformers' spellings of a size."""
    return size if isinstance(size, int) else size.get("shortest_edge", size.get("height"))


def pad_colour(mean: tuple[float, ...]) -> tuple[int, int, int]:
    """The colour of the borders: the mean colour, as upstream's expand2square."""
    red, green, blue = (int(255 * value) for value in mean)
    return red, green, blue


def save_processor(
    config: LlavaConfig, tokenizer: PreTrainedTokenizerBase, preprocessing: Preprocessing, out: Path
) -> None:
    """Write tokenizer and image processor to `out` as transformers' LlavaProcessor.

    Raises:
        ValueError: the borders would not have the mean colour, which is the only one transformers paints.
    """
    size = preprocessing.size
    if preprocessing.square == "pad" and preprocessing.pad_colour != pad_colour(preprocessing.mean):
        raise ValueError(f"borders of {preprocessing.pad_colour}: transformers' processor knows the mean colour only")
    image_processor = LlavaImageProcessorPil(
        do_pad=preprocessing.square == "pad",
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample={name: number for number, name in _RESAMPLING.items()}[preprocessing.resampling],
        image_mean=list(preprocessing.mean),
        image_std=list(preprocessing.std),
    )
    # Vision tokens are counted in pooled patches: an effective patch as wide as image / sqrt(V), no CLS to subtract.
    effective_patch = size // round(config.image_seq_length**0.5)
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=effective_patch,
        vision_feature_select_strategy="full",
    ).save_pretrained(out)
