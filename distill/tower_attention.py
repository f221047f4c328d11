"""Attention of the vision tower in training: within cells or over the whole picture, and local to begin with."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, CLIPVisionModel

WHOLE, BY_CELL = "whole", "by_cell"
# Starting size of the positions: of the same order as the patches, so that neither drowns the other.
POSITION_SCALE = 0.7
# Strength with which queries and keys start out comparing positions, and the first of the four frequencies compared:
# attention then begins local (about 45 % of it within the own cell instead of 11 %), and what was learned within cells
# survives the change to the whole picture.
LOCALITY = 3.0
LOCAL_FREQUENCY = 8


def set_grid_positions(tower: CLIPVisionModel) -> None:
    """Starts the patches' position embeddings as 2-D sines, so that the grid need not be discovered."""
    weight = tower.embeddings.position_embedding.weight  # [1 + P, D]
    side, quarter = math.isqrt(weight.shape[0] - 1), weight.shape[1] // 4
    frequencies = (math.pi / 2) / 16 ** (torch.arange(quarter) / quarter)  # [D/4]
    angles = torch.arange(side)[:, None] * frequencies  # [side, D/4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, D/2]
    rows, columns = waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)  # [P, D/2]
    with torch.no_grad():
        weight[1:] = POSITION_SCALE * torch.cat([rows, columns], dim=1)  # [P, D]


def set_local_attention(tower: CLIPVisionModel) -> None:
    """Starts every head comparing positions: q.k, sums of cosines, then falls with the distance of two patches."""
    quarter = tower.config.hidden_size // 4  # sine and cosine of rows, sine and cosine of columns
    size = tower.config.hidden_size // tower.config.num_attention_heads
    count = size // 4
    rows = torch.arange(tower.config.hidden_size)
    part, frequency = rows % size // count, rows % count  # which wave each query dimension reads
    columns = part * quarter + LOCAL_FREQUENCY + frequency
    for layer in tower.encoder.layers:
        with torch.no_grad():
            layer.self_attn.q_proj.weight[rows, columns] += LOCALITY
            layer.self_attn.k_proj.weight[rows, columns] += LOCALITY


def whole_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: object
) -> tuple[Tensor, None]:
    """Attention in float32 inside bfloat16 autocast: on CPU its backward is 1.7 times faster than bfloat16's.

    Args:
        module, attention_mask, _: unused, they belong to the signature of transformers' attention interface.
        query, key, value: [B, H, N, D/H] in any float type.
    """
    with torch.autocast("cpu", enabled=False):
        mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float())  # [B, H, N, D/H]
    return mixed.transpose(1, 2).contiguous(), None  # [B, N, H, D/H]


def attention_by_cell(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: object
) -> tuple[Tensor, None]:
    """Attention of every patch to its own cell alone, and of CLS to all: arguments and result as `whole_attention`."""
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.float(), key.float(), value.float()  # [B, H, N, D/H]
        whole = F.scaled_dot_product_attention(query[:, :, :1], key, value)  # [B, H, 1, D/H]
        queries, keys, values = (_split_cells(states[:, :, 1:]) for states in (query, key, value))
        mixed = F.scaled_dot_product_attention(queries, keys, values)  # [B*9, H, P/9, D/H]
    mixed = torch.cat([whole, _join_cells(mixed)], dim=2)  # [B, H, N, D/H]
    return mixed.transpose(1, 2).contiguous(), None  # [B, N, H, D/H]


def _split_cells(patches: Tensor) -> Tensor:
    """[B, H, P, d] -> [B*9, H, P/9, d], the patches of each cell together."""
    batch, heads, count, width = patches.shape
    side = math.isqrt(count) // 3
    grid = patches.reshape(batch, heads, 3, side, 3, side, width)
    return grid.permute(0, 2, 4, 1, 3, 5, 6).reshape(batch * 9, heads, side * side, width)


def _join_cells(cells: Tensor) -> Tensor:
    """[B*9, H, P/9, d] -> [B, H, P, d], the inverse of `_split_cells`."""
    count, heads, patches, width = cells.shape
    side = math.isqrt(patches)
    grid = cells.reshape(count // 9, 3, 3, heads, side, side, width)
    return grid.permute(0, 3, 1, 4, 2, 5, 6).reshape(count // 9, heads, patches * 9, width)


AttentionInterface.register(WHOLE, whole_attention)
AttentionInterface.register(BY_CELL, attention_by_cell)
