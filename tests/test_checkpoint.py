"""A checkpoint that is not whole is refused, and weights that were written wrong do not pass for rounded ones."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.rounding import check_rounding
from vlm.errors import CheckFailed, UserError
from vlm.manifest import Precision
from vlm.models.checkpoint import load_checkpoint


def test_missing_tensors_are_listed_not_made_up(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        load_checkpoint(folder)


def test_a_quantizer_that_scales_is_caught(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    stored = Precision(vision="int8", projector="int8", embedding="int4", decoder="int4")
    name, exact = "lm_head.weight", checkpoint.model.lm_head.weight.detach()
    rounded = exact + 0.05 * exact.std() * torch.randn_like(exact)
    check_rounding(checkpoint, {name: rounded}, stored, "it")
    with pytest.raises(CheckFailed, match=name):
        check_rounding(checkpoint, {name: 3 * rounded}, stored, "it")


def test_a_component_is_held_to_its_own_storage(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    stored = Precision(vision="int8", projector="int8", embedding="int4", decoder="int4")
    name = next(n for n, p in checkpoint.model.named_parameters() if n.startswith("model.multi_modal_") and p.ndim == 2)
    exact = checkpoint.model.get_parameter(name).detach()
    rounded = exact + 0.05 * exact.std() * torch.randn_like(exact)
    with pytest.raises(CheckFailed, match=rf"{name}.*at most 0\.03 expected of int8"):
        check_rounding(checkpoint, {name: rounded}, stored, "it")
    check_rounding(checkpoint, {name: rounded}, stored.model_copy(update={"projector": "int4"}), "it")
