"""Attention for training on a CPU: two matrix products and a softmax.

PyTorch's fused attention on CPUs is slow in its backward pass for short heads: with it a step of the built-in student
takes about 1.2 times as long (`python -m benchmarks.attention` measures both). On a GPU the fused kernels stay.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill.teacher.signals import Batch

DENSE = "dense"
LONGEST = 1024  # tokens; beyond, the fused attention is used, whose memory does not grow with their square


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling + mask) v, in transformers' attention interface.

    Args:
        query: [B, H, N, d]; key, value: [B, KV, N, d], shared by H / KV query heads.
        attention_mask: additive, [B, 1, N, N]; None: causal, which is left to the fused attention.
    Returns:
        [B, N, H, d].
    """
    if attention_mask is None or query.shape[2] > LONGEST:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))  # [B, H, N, d]
    scores = (query * scaling) @ key.transpose(-1, -2) + attention_mask  # [B, H, N, N]
    mixed = scores.softmax(-1).to(value.dtype) @ value  # [B, H, N, d]
    return mixed.transpose(1, 2).contiguous(), None


def decoder_inputs(batch: Batch, embeds: Tensor) -> dict[str, Any]:
    """A decoder's arguments for embeddings [B, N, D] of the batch."""
    mask = None if batch.visible is None else additive_mask(batch.visible, embeds.dtype)
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }


def additive_mask(visible: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn a bool mask (True = may be seen) into one that is added to scores, in the dtype the products run in: under
    autocast autocast's, else the given one."""
    device = visible.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, max(-1e9, torch.finfo(dtype).min))


AttentionInterface.register(DENSE, dense_attention)
