"""Cross-entropy and L_KL over the vocabulary, a few tokens at a time.

Hidden states go through both models' heads in chunks; a chunk's logits are made again in the backward pass, so that no
logits of all tokens, [A, vocabulary] or larger, exist for either model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distill.losses.logits import Distance, with_rest
from distill.teacher.signals import Hidden, TopK
from vlm.data.collator import IGNORE

CHUNK = 2**22  # logits computed at a time: 16 MB in float32

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """How the student's distribution is held against the teacher's."""

    distance: Distance
    part: float
    temperature: float


def answer_losses(
    states: Tensor,
    labels: Tensor,
    head: Head,
    vocabulary: int,
    teacher: Hidden | TopK | None = None,
    divergence: Divergence | None = None,
    chunk: int = CHUNK,
    together: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of the labels, and the divergence from the teacher.

    Args:
        states: last hidden states of the student, [A, D_S].
        labels: [A]; IGNORE where only the teacher speaks.
        head: the student's head, [a, D_S] -> [a, vocabulary].
        vocabulary: width of the logits.
        teacher: the teacher's answers at the same positions; None: no divergence.
        divergence: how to compare; its mean is over all A, times temperature squared.
        chunk: logits computed at a time; all at once, and nothing made again, if they fit.
        together: call the head as often as the process that has the most tokens: with ZeRO-3 every call gathers its
            weights from all processes, and one that called it less often would leave the others waiting.
    Returns:
        Mean cross-entropy over the labels that count, and mean divergence or None.
    """
    counted = (labels != IGNORE).sum().clamp(min=1)
    tokens, at_once = max(1, len(states)), max(1, chunk // vocabulary)
    parts = _parts(len(states), at_once, together, states.device)
    if len(parts) <= 1:
        ce, kl = _sums(states, labels, head, teacher, divergence)
        return ce / counted, None if kl is None else kl / tokens
    sums = [
        checkpoint(
            _sums,
            *(states[part], labels[part], head, teacher and teacher.part(part), divergence),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for part in parts
    ]
    supervised = torch.stack([ce for ce, _ in sums]).sum() / counted
    return supervised, None if teacher is None else torch.stack([kl for _, kl in sums]).sum() / tokens


def _parts(tokens: int, at_once: int, together: bool, device: torch.device) -> list[slice]:
    """Stretches of the tokens; with `together` as many as in the process that has most, the last ones empty."""
    count = -(-tokens // at_once)
    if together:
        count = _most(count, device)
    return [slice(start, start + at_once) for start in range(0, count * at_once, at_once)]


def _most(count: int, device: torch.device) -> int:
    """The highest of all processes' counts."""
    highest = torch.tensor(count, device=device)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return int(highest)


def _sums(
    states: Tensor, labels: Tensor, head: Head, teacher: Hidden | TopK | None, divergence: Divergence | None
) -> tuple[Tensor, Tensor | None]:
    """Sums over some tokens of the cross-entropy and of the divergence."""
    logits = _wide(head(states))  # [a, vocabulary]
    theirs = None
    if isinstance(teacher, Hidden):
        with torch.no_grad():
            theirs = _wide(teacher.head(teacher.states))  # [a, vocabulary]
    with torch.autocast(states.device.type, enabled=False):
        supervised = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
        if teacher is None or divergence is None:
            return supervised, None
        temperature = divergence.temperature
        log_q = _log_probabilities(logits, temperature)  # [a, vocabulary]
        if isinstance(teacher, TopK):
            log_p, log_q = with_rest(teacher.log_probabilities), with_rest(log_q.gather(-1, teacher.ids))  # [a, k + 1]
        else:
            assert theirs is not None
            log_p = _log_probabilities(theirs, temperature)  # [a, vocabulary]
        return supervised, divergence.distance(log_p, log_q, divergence.part).sum() * temperature**2


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)
