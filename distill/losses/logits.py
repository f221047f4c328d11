"""L_KL: the teacher's distribution over the next token (Align-KD eq. 6, reverse KL after MiniLLM), and its relatives.

Every distance takes log-probabilities and returns one value a token; with p the teacher and q the student:
    reverse_kl       KL(q || p)                                          forward_kl  KL(p || q)
    skew_reverse_kl  KL(q || a q + (1 - a) p)  (DistiLLM)                skew_kl     KL(p || a p + (1 - a) q)
    jsd              b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q  (GKD)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor, float], Tensor]


def reverse_kl(log_p: Tensor, log_q: Tensor, part: float = 0.0) -> Tensor:
    """sum q log(q / p), as published.

    Args:
        log_p: log-probabilities of the teacher, [A, vocabulary].
        log_q: log-probabilities of the student, [A, vocabulary].
        part: not used; the share of the mixture's first part in the distances that have one.
    Returns:
        [A].
    """
    return _kl(log_q, log_p)


def forward_kl(log_p: Tensor, log_q: Tensor, part: float = 0.0) -> Tensor:
    """sum p log(p / q). Arguments as `reverse_kl`."""
    return _kl(log_p, log_q)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, part: float) -> Tensor:
    """KL(q || a q + (1 - a) p) with a = part. Arguments as `reverse_kl`."""
    return _kl(log_q, _mix(log_q, log_p, part))


def skew_kl(log_p: Tensor, log_q: Tensor, part: float) -> Tensor:
    """KL(p || a p + (1 - a) q) with a = part. Arguments as `reverse_kl`."""
    return _kl(log_p, _mix(log_p, log_q, part))


def jsd(log_p: Tensor, log_q: Tensor, part: float) -> Tensor:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q, b = part. Arguments as `reverse_kl`."""
    middle = _mix(log_p, log_q, part)
    return part * _kl(log_p, middle) + (1 - part) * _kl(log_q, middle)


DISTANCES: dict[str, Distance] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
}


def with_rest(log_probabilities: Tensor) -> Tensor:
    """Add the probability of everything else to some tokens' log-probabilities: [A, k] -> [A, k + 1]."""
    rest = 1 - log_probabilities.exp().sum(-1, keepdim=True)  # [A, 1]
    return torch.cat([log_probabilities, rest.clamp(min=1e-7).log()], dim=-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mix(log_a: Tensor, log_b: Tensor, part: float) -> Tensor:
    return torch.logaddexp(log_a + math.log(part), log_b + math.log1p(-part))
