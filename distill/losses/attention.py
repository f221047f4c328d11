"""L_A: a block of the teacher's attention taught to the student (Align-KD eq. 1: first layer, text x vision)."""

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6


def attention_mse(teacher: Tensor, student: Tensor, head_map: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Mean squared error on probabilities with a learned 1x1 convolution over heads, as published.

    Args:
        teacher: A_T, [B, H_T, M, V]; zero in padding.
        student: A_S, [B, H_S, M, V]; zero in padding.
        head_map: weights of the 1x1 convolution, [H_S, H_T].
        rows: bool [B, M], False for padding.
        columns: bool [B, 1 or M, V], False for padding and for another record's columns in a packed row.
    """
    mapped = torch.einsum("sh,bhmv->bsmv", head_map, teacher)  # [B, H_S, M, V]
    count = columns.sum(-1).clamp(min=1)[:, None]  # [B, 1, 1 or M]
    return _mean_over_rows((mapped - student).square().sum(-1) / count, rows)


def attention_kl(teacher: Tensor, student: Tensor, head_map: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """KL(teacher || student) of rows renormalised over the block's columns; teacher heads are mixed convexly
    (softmax of head_map), so that no adapter can make both sides vanish. Arguments as `attention_mse`."""
    mixed = torch.einsum("sh,bhmv->bsmv", head_map.softmax(-1), teacher)  # [B, H_S, M, V]
    real = columns[:, None]  # [B, 1, 1 or M, V]
    p, q = _renormalise(mixed, real), _renormalise(student, real)
    terms = p * (p.masked_fill(~real, 1).log() - q.masked_fill(~real, 1).log())  # [B, H_S, M, V]
    return _mean_over_rows(terms.sum(-1), rows)


def attention_cosine(teacher: Tensor, student: Tensor, head_map: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """1 - cosine of each row with a free head map: the scale of neither side matters. Arguments as `attention_mse`
    (padded columns are zero on both sides, which no cosine sees)."""
    mapped = torch.einsum("sh,bhmv->bsmv", head_map, teacher)  # [B, H_S, M, V]
    return _mean_over_rows(1 - F.cosine_similarity(mapped, student, dim=-1, eps=EPSILON), rows)


DISTANCES = {"mse": attention_mse, "kl": attention_kl, "cosine": attention_cosine}


def _renormalise(probabilities: Tensor, real: Tensor) -> Tensor:
    shifted = (probabilities + EPSILON) * real
    return shifted / shifted.sum(-1, keepdim=True).clamp(min=EPSILON)


def _mean_over_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Mean of values [B, H, M] over heads and the rows that count."""
    weights = rows[:, None].to(values.dtype)  # [B, 1, M]
    return (values * weights).sum() / (weights.sum() * values.shape[1]).clamp(min=1)
