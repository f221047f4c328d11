"""GPTQ keeps the products of a matrix with what it is really multiplied with, on the grid that the format has."""

from pathlib import Path

import numpy as np
import pytest
import torch

from export.blocks import Rounding, quantize_blocks
from export.calibration import LayerInputs, calibration_embeddings
from export.gptq import DAMPING, inverse_factor
from tests.tiny import save_random_checkpoint
from vlm.models.checkpoint import load_checkpoint

GRIDS = [Rounding(4, 32), Rounding(4, 32, True), Rounding(4, 32, True, "float16", True)]


def _inputs() -> np.ndarray:
    """Correlated rows [400, 96], as activations are."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((400, 12)) @ rng.standard_normal((12, 96)) + 0.3).astype(np.float32)


def _factor(inputs: np.ndarray) -> np.ndarray:
    return inverse_factor(torch.from_numpy(inputs.T @ inputs / len(inputs))).numpy()


@pytest.mark.parametrize("rounding", GRIDS)
def test_products_are_nearer_than_of_the_nearest_integers(rounding: Rounding) -> None:
    inputs, matrix = _inputs(), np.random.default_rng(1).standard_normal((70, 96)).astype(np.float32)
    nearest, chosen = quantize_blocks(matrix, rounding), quantize_blocks(matrix, rounding, _factor(inputs))
    np.testing.assert_array_equal(nearest.scales, chosen.scales)
    assert chosen.codes.max() <= 15
    before, after = (((blocks.dequantize(96) - matrix) @ inputs.T).std() for blocks in (nearest, chosen))
    assert after < 0.5 * before


def test_inputs_without_correlation_give_the_nearest_integers() -> None:
    matrix = np.random.default_rng(1).standard_normal((5, 80)).astype(np.float32)  # the last block is half padding
    nearest = quantize_blocks(matrix, GRIDS[0])
    chosen = quantize_blocks(matrix, GRIDS[0], np.eye(80, dtype=np.float32))
    np.testing.assert_array_equal(nearest.codes, chosen.codes)


def test_the_factor_is_of_the_damped_inverse() -> None:
    moments = torch.from_numpy(_inputs().T @ _inputs() / 400)
    factor = inverse_factor(moments)
    damped = moments + torch.eye(96) * moments.diagonal().mean() * DAMPING
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(96), atol=2e-3, rtol=0)


@pytest.mark.parametrize("rounding", [*GRIDS[1:], Rounding(4, 32, True, "bfloat16", True)])
def test_scales_are_numbers_of_their_type_and_positive_where_they_must_be(rounding: Rounding) -> None:
    matrix = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    blocks, kind = quantize_blocks(matrix, rounding), getattr(torch, rounding.scale)
    np.testing.assert_array_equal(torch.from_numpy(blocks.scales).to(kind).float().numpy(), blocks.scales)
    assert (blocks.scales > 0).all() == rounding.positive
    assert np.linalg.norm(blocks.dequantize(64) - matrix) < 0.1 * np.linalg.norm(matrix)


def test_a_layers_inputs_are_the_models_whatever_the_order_they_are_asked_in(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    layers, seen = checkpoint.model.model.language_model.layers, list[torch.Tensor]()
    down = layers[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, read: seen.append(read[0][0]))
    with torch.no_grad():
        for x in calibration_embeddings(checkpoint, 2):
            checkpoint.model(inputs_embeds=x)
    hook.remove()
    truth = inverse_factor(torch.stack([x.T @ x / len(x) for x in seen]).mean(0))
    inputs = LayerInputs(checkpoint, lambda: calibration_embeddings(checkpoint, 2))
    for _ in range(2):
        found = inputs.factor(down.weight)
        assert found is not None
        torch.testing.assert_close(torch.from_numpy(found), truth, rtol=2e-2, atol=2e-2)
        head, first = inputs.factor(checkpoint.model.lm_head.weight), inputs.factor(layers[0].self_attn.q_proj.weight)
        assert head is not None and first is not None and head.shape == first.shape
        assert not np.allclose(head, first)


def test_what_is_no_matrix_of_the_decoder_has_none(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save_random_checkpoint(tmp_path / "checkpoint"))
    inputs = LayerInputs(checkpoint, lambda: calibration_embeddings(checkpoint, 1))
    for name in ("model.language_model.embed_tokens.weight", "model.language_model.norm.weight"):
        assert inputs.factor(checkpoint.model.get_parameter(name)) is None
    assert not inputs.asked
