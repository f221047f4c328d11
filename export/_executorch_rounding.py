"""Weights as torchao's tensors, which become what XNNPACK knows: 4 bits in groups of columns, or 8 bits per row."""

from typing import Any

import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis

from export.blocks import Rounding, quantize_blocks

ZERO = 8  # of the codes; torchao's integers are signed
_ROWS = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
_ROWS_ALONE = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))


def byte_weight(weight: torch.Tensor, inputs: bool = True) -> Any:
    """Round a weight [out, in] to 8 bits with a scale per row.

    Args:
        weight: float32.
        inputs: whether the layer's inputs are rounded to 8 bits per token, too.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, _ROWS if inputs else _ROWS_ALONE, lambda found, _: isinstance(found, nn.Linear))
    return layer.weight


def nibble_weight(weight: torch.Tensor, group: int, factor: Any) -> IntxUnpackedToInt8Tensor:
    """Round a weight [out, in] to 4 bits in groups of columns; its inputs are rounded to 8 bits per token.

    Args:
        weight: float32; its rows divide into groups.
        group: columns that share a scale.
        factor: see `export.blocks.quantize_blocks`.
    """
    # XNNPACK keeps the scales in bfloat16 and wants them positive.
    rounding = Rounding(4, group, symmetric=True, scale="bfloat16", positive=True)
    blocks = quantize_blocks(weight.detach().numpy(), rounding, factor)
    return IntxUnpackedToInt8Tensor(
        qdata=torch.from_numpy(blocks.codes).to(torch.int8) - ZERO,
        scale=torch.from_numpy(blocks.scales).bfloat16(),
        zero_point=torch.zeros(blocks.scales.shape, dtype=torch.int8),
        target_dtype=torch.int4,  # type: ignore[attr-defined]  # torch makes its narrow types at run time
        block_size=(1, group),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )
