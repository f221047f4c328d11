"""ExecuTorch stores each component as asked, and lowers to accelerators that this machine does not have."""

from pathlib import Path

import pytest

pytest.importorskip("executorch.exir", reason="executorch is not installed")

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import export.formats.executorch as executorch_format
from export._executorch_rounding import nibble_weight
from export.blocks import Rounding, quantize_blocks
from export.config import ExportConfig
from export.run import export_one
from tests.artifacts import CONTEXT
from tests.executorch_artifacts import compiled_engine
from tests.tiny import random_model, save_random_checkpoint
from vlm.manifest import read_manifest
from vlm.models.checkpoint import load_checkpoint

SHARP = 50  # times the queries and keys of a random tower: it attends to single patches, and its parity is lost
# where what softmax exponentiates is rounded


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of one layer whose rows groups of 128 divide, behind a tower of sharp attention."""
    folder = tmp_path_factory.mktemp("components") / "checkpoint"
    save_random_checkpoint(folder, hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "vision_tower" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = weight * SHARP
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("vision", ["int8", "8da8w"])
def test_every_component_is_stored_as_asked_and_passes_its_parity(
    vision: str, checkpoint: Path, tmp_path: Path
) -> None:
    compiled_engine()
    config = ExportConfig(probes=1, threads=1, context_length=CONTEXT)
    mixed = f"8da4w-128,vision={vision},projector={vision},head=8da8w"
    manifest = read_manifest(export_one(checkpoint, f"executorch:{mixed}", tmp_path, config))
    assert manifest.parity is not None and manifest.parity.passed
    assert manifest.precisions.model_dump() == {
        "vision": vision, "projector": vision, "embedding": "int8", "decoder": "8da4w-128", "head": "8da8w",
    }  # fmt: skip
    weights = executorch_format.dequantized(load_checkpoint(checkpoint), mixed, tmp_path / manifest.name)
    assert weights is not None
    for name, weight in weights.items():
        if "language_model.layers" in name:
            assert max(len(torch.unique(row)) for row in weight.reshape(-1, 128)) <= 16, name
    assert {"lm_head.weight", "model.multi_modal_projector.linear_1.weight"} <= set(weights)
    assert sum("vision_tower" in name for name in weights) == 12


def test_torchaos_tensor_holds_the_blocks_that_were_chosen() -> None:
    weight = random_model(40, 3).lm_head.weight.detach()  # [40, 64]
    rounding = Rounding(4, 32, symmetric=True, scale="bfloat16", positive=True)
    blocks = quantize_blocks(weight.numpy(), rounding)
    np.testing.assert_allclose(nibble_weight(weight, 32, None).dequantize().numpy(), blocks.dequantize(64))


@pytest.mark.parametrize("precision", ["coreml", "vulkan", "coreml,decoder=8da4w", "vulkan,embedding=int8"])
def test_accelerators_get_a_program_that_says_it_was_never_run(
    precision: str, checkpoint: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(export_one(checkpoint, f"executorch:{precision}", tmp_path, ExportConfig(probes=1)))
    program = (tmp_path / manifest.name / "model.pte").read_bytes()
    assert (b"CoreMLBackend" if precision.startswith("coreml") else b"VulkanBackend") in program
    assert manifest.parity is None and any("never run" in note for note in manifest.notes)
