"""L_V: the projector's vision tokens, all of them and those the teacher's text looks at (Align-KD eq. 2 to 5), or each
by how much the teacher's instruction looks at it (after Align-TI)."""

import torch
from torch import Tensor

from vlm.data.collator import IGNORE

EPSILON = 1e-6


def focus_scores(teacher_attention: Tensor, rows: Tensor) -> Tensor:
    """Score_n = sum over text rows of A_T[m, n], mean over heads (eq. 2): [B, H, M, V] -> [B, V]."""
    return torch.einsum("bhmv,bm->bv", teacher_attention, rows.to(teacher_attention.dtype)) / teacher_attention.shape[1]


def vision_mse(teacher: Tensor, student: Tensor, scores: Tensor, focus_tokens: int, focus_weight: float) -> Tensor:
    """L_all + lambda * L_focus (eq. 3 to 5).

    Args:
        teacher: P_V(E_T), teacher tokens of each image mapped to the student's width, [I, V, D].
        student: E_S, [I, V, D].
        scores: focus scores, [I, V].
        focus_tokens: K, how many of the highest scores count as focused.
        focus_weight: lambda, on the focus term.
    """
    if not len(student):  # a batch of text only: the mean of nothing would be NaN
        return student.sum() + teacher.sum()  # connected to both, for data-parallel training
    squared = (teacher - student).square().mean(-1)  # [I, V]
    if not focus_weight:
        return squared.mean()
    best = scores.topk(min(focus_tokens, scores.shape[1]), dim=-1).indices  # [I, K]
    return squared.mean() + focus_weight * squared.gather(1, best).mean()


def instruction_rows(labels: Tensor, rows: Tensor, row_mask: Tensor) -> Tensor:
    """Which text rows ask, rather than answer, bool [B, M]; all of a row of the batch that only answers (a caption).

    Args:
        labels: [B, N], on the predicting positions, else IGNORE.
        rows: positions of the text, [B, M]; row_mask: bool, False for padding.
    """
    answers = torch.zeros_like(labels, dtype=torch.bool)  # [B, N]
    answers[:, 1:] = labels[:, :-1] != IGNORE
    asking = row_mask & ~answers.gather(1, rows)  # [B, M]
    return torch.where(asking.any(-1, keepdim=True), asking, row_mask)


def weighted_mse(teacher: Tensor, student: Tensor, scores: Tensor) -> Tensor:
    """sum_n w_n (P_V(E_T)_n - E_S,n)^2 with w_n = Score_n / sum Score, mean over images and width.

    The weights are the instruction's part of Align-TI (ICML 2026, arXiv 2602.09483); arguments as `vision_mse`.
    """
    if not len(student):
        return student.sum() + teacher.sum()
    weights = scores / scores.sum(-1, keepdim=True).clamp(min=EPSILON)  # [I, V]
    return ((teacher - student).square().mean(-1) * weights).sum(-1).mean()
