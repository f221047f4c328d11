"""Attention for training on a CPU: two matrix products and a softmax.

PyTorch's fused attention on CPUs is slow in its backward pass for short heads: with it a step of the built-in student
takes about 1.2 times as long (`python -m benchmarks.attention` measures both). On a GPU the fused kernels stay.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

DENSE = "dense"


def dense_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling + mask) v, in transformers' attention interface.

    Args:
        query: [B, H, N, d]; key, value: [B, KV, N, d], shared by H / KV query heads.
        attention_mask: additive, [B, 1, N, N].
    Returns:
        [B, N, H, d].
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))  # [B, H, N, d]
    scores = (query * scaling) @ key.transpose(-1, -2) + attention_mask  # [B, H, N, N]
    mixed = scores.softmax(-1).to(value.dtype) @ value  # [B, H, N, d]
    return mixed.transpose(1, 2).contiguous(), None


def additive_mask(visible: Tensor) -> Tensor:
    """Turn a bool mask (True = may be seen) into one that is added to scores, in the dtype the products run in."""
    device = visible.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -1e9)


AttentionInterface.register(DENSE, dense_attention)
