"""A checkpoint that is not whole is refused, and weights that were written wrong do not pass for rounded ones."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.run import _check_rounding, parse_target
from vlm.errors import CheckFailed, UserError
from vlm.models.checkpoint import load_checkpoint


def test_missing_tensors_are_listed_not_made_up(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        load_checkpoint(folder)


def test_a_quantizer_that_scales_is_caught(random_checkpoint: Path) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    checkpoint = load_checkpoint(random_checkpoint)
    name, exact = "lm_head.weight", checkpoint.model.lm_head.weight.detach()
    rounded = exact + 0.05 * exact.std() * torch.randn_like(exact)
    target = parse_target("onnx:int4")
    _check_rounding(checkpoint, {name: rounded}, target)
    with pytest.raises(CheckFailed, match=name):
        _check_rounding(checkpoint, {name: 3 * rounded}, target)
