"""A checkpoint's own way to prepare pictures is read from either of transformers' files, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.errors import UserError
from vlm.models.processor import read_preprocessing

CLIP = {
    "crop_size": {"height": 96, "width": 96},
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "resample": 3,
    "size": {"shortest_edge": 96},
}


@pytest.mark.parametrize("older", [True, False], ids=["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("changes", [{}, {"size": 96, "crop_size": 96}, {"do_pad": True}, {"resample": 2}])
def test_both_files_say_the_same(older: bool, changes: dict[str, Any], tmp_path: Path) -> None:
    values = CLIP | changes
    name = "preprocessor_config.json" if older else "processor_config.json"
    (tmp_path / name).write_text(json.dumps(values if older else {"image_processor": values, "patch_size": 8}))
    if not older:  # an older file beside it does not count
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP | {"image_mean": [0, 0, 0]}))
    found = read_preprocessing(tmp_path, 96)
    assert (found.size, found.mean, found.std) == (96, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert found.square == ("pad" if changes.get("do_pad") else "crop")
    assert found.resampling == ("bilinear" if changes.get("resample") == 2 else "bicubic")
    assert found.pad_colour == (127, 127, 127)


def test_a_processor_config_without_pictures_leaves_them_to_the_older_file(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    assert read_preprocessing(tmp_path, 96).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_center_crop": False}, "neither do_pad nor do_center_crop"),
        ({"do_normalize": False}, "do_normalize false"),
        ({"crop_size": 90}, "96 pixels, cut to 90, where the vision tower takes 96"),
        ({"resample": 0}, "resample 0"),
    ],
)
def test_another_way_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP | changes))
    with pytest.raises(UserError, match=message):
        read_preprocessing(tmp_path, 96)


def test_no_file_is_no_guess(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither processor_config.json .* nor preprocessor_config.json found"):
        read_preprocessing(tmp_path, 96)
