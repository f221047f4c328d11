"""L_V: the projector's vision tokens, all of them and those the teacher's text looks at (Align-KD eq. 2 to 5)."""

import torch
from torch import Tensor


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
