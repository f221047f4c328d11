"""Cross-entropy and L_KL over the vocabulary, a few tokens at a time.

Hidden states go through both models' heads in chunks, so that no logits of all tokens, [A, vocabulary] or larger, exist
for either model. The gradient is made in the forward pass, while a chunk's logits are there, as Liger-Kernel's fused
losses do; for a head that is no plain matrix, or whose weight ZeRO-3 has split, a chunk's logits are made again in the
backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distill.losses.logits import Distance, with_rest
from distill.precision import wide, wide_dtype
from distill.teacher.signals import Hidden, TopK
from vlm.data.collator import IGNORE

CHUNK = {"cpu": 2**22, "cuda": 2**25}  # logits computed at a time: 16 and 128 MB in float32

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """How the student's distribution is held against the teacher's.

    Attributes:
        distance, part, temperature: of distill.terms.LogitsTerm.
        weight: its factor in the loss, for which gradients are made in the forward pass; those of another factor are
            right too, but cost both heads again.
    """

    distance: Distance
    part: float
    temperature: float
    weight: Tensor | float = 1.0


def answer_losses(
    states: Tensor,
    labels: Tensor | None,
    head: Head,
    vocabulary: int,
    teacher: Hidden | TopK | None = None,
    divergence: Divergence | None = None,
    chunk: int | None = None,
    together: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of the labels, and the divergence from the teacher.

    Args:
        states: last hidden states of the student, [A, D_S].
        labels: [A]; IGNORE where only the teacher speaks; None: nowhere else, and the cross-entropy is zero.
        head: the student's head, [a, D_S] -> [a, vocabulary].
        vocabulary: width of the logits.
        teacher: the teacher's answers at the same positions; None: no divergence.
        divergence: how to compare; its mean is over all A, times temperature squared.
        chunk: logits computed at a time, None: CHUNK; all at once, in one graph, if they fit.
        together: call the head as often as the process that has the most tokens: with ZeRO-3 every call gathers its
            weights from all processes, and one that called it less often would leave the others waiting.
    Returns:
        Mean cross-entropy over the labels that count, and mean divergence or None.
    """
    counted = 1 if labels is None else (labels != IGNORE).sum().clamp(min=1)
    tokens, at_once = max(1, len(states)), max(1, (chunk or CHUNK[states.device.type]) // vocabulary)
    work = _Work(labels, teacher, divergence)
    parts = _parts(len(states), at_once, together, states.device)
    if len(parts) <= 1:
        ce, kl = work.sums(head(states))
    elif type(head) is nn.Linear and head.bias is None and not together and torch.is_grad_enabled():
        factors = [1 / counted, float(divergence.weight) / tokens if divergence else 0.0]
        factors = [0.0, 1 / tokens] if labels is None else factors
        ce, kl = _Fused.apply(states, head.weight, work, parts, wide(states[:0]).new_tensor(factors))
    else:
        again = partial(checkpoint, work.of, head, use_reentrant=False, preserve_rng_state=False)
        sums = [again(states[part], part) for part in parts]
        ce, kl = (torch.stack(column).sum() for column in zip(*sums, strict=True))
    return ce / counted, None if teacher is None else kl / tokens


def divergence_alone(
    states: Tensor, head: Head, vocabulary: int, teacher: Hidden | TopK, divergence: Divergence, together: bool = False
) -> Tensor:
    """Mean divergence from the teacher, of tokens that have no label. Arguments as `answer_losses`."""
    _, value = answer_losses(states, None, head, vocabulary, teacher, divergence, together=together)
    assert value is not None  # there is a teacher
    return value


@dataclass(frozen=True)
class _Work:
    """What the student's logits are held against."""

    labels: Tensor | None
    teacher: Hidden | TopK | None
    divergence: Divergence | None

    def of(self, head: Head, states: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """`sums` of a head's logits of some tokens' states, [a, D_S]."""
        return self.sums(head(states), part)

    def sums(self, logits: Tensor, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Sums over some tokens, whose logits are [a, vocabulary], of the cross-entropy and of the divergence."""
        teacher = self.teacher and self.teacher.part(part)
        theirs = None
        if isinstance(teacher, Hidden):
            with torch.no_grad():
                theirs = wide(teacher.head(teacher.states))  # [a, vocabulary]
        with torch.autocast(logits.device.type, enabled=False):
            logits = wide(logits)
            supervised = logits.new_zeros(())
            if self.labels is not None:
                supervised = F.cross_entropy(logits, self.labels[part], reduction="sum", ignore_index=IGNORE)
            if teacher is None or self.divergence is None:
                return supervised, supervised.detach() * 0
            temperature = self.divergence.temperature
            log_q = _log_probabilities(logits, temperature)  # [a, vocabulary]
            if isinstance(teacher, TopK):
                log_q = with_rest(log_q.gather(-1, teacher.ids))  # [a, k + 1]
                log_p = with_rest(teacher.log_probabilities)  # [a, k + 1]
            else:
                assert theirs is not None
                log_p = _log_probabilities(theirs, temperature)  # [a, vocabulary]
            return supervised, self.divergence.distance(log_p, log_q, self.divergence.part).sum() * temperature**2


class _Fused(torch.autograd.Function):
    """Both sums over all parts, where the head is a matrix; gradients are made while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, work: _Work, parts: list[slice], factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums, of states [A, D_S] and weight [vocabulary, D_S]; gradients for their sum times factors, [2]."""
        device = states.device.type
        ctx.save_for_backward(states, weight, factors)
        ctx.work, ctx.parts = work, parts
        ctx.autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        sums, ctx.gradients = _Fused.run(ctx, states, weight, factors)
        return sums[0], sums[1]

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients made before, if the sums entered the loss in the expected proportion, else new ones."""
        states, weight, factors = ctx.saved_tensors
        wanted, there = torch.stack(outer), int(ctx.work.labels is None)  # [2]; the first sum, or the only one
        scale, gradients = wanted[there] / factors[there], ctx.gradients
        if not torch.allclose(wanted, scale * factors, rtol=1e-5, atol=0):
            scale, gradients = torch.ones_like(scale), _Fused.run(ctx, states, weight, wanted)[1]
        if scale != 1:
            gradients = [None if g is None else g * scale for g in gradients]
        ours, heads = (None if g is None else g.to(x.dtype) for g, x in zip(gradients, (states, weight), strict=True))
        return ours, heads, None, None, None

    @staticmethod
    def run(ctx: Any, states: Tensor, weight: Tensor, factors: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Both sums [2], and what gradients of states and weight are needed."""
        sums = torch.zeros_like(factors)
        # Exact in float32 and bfloat16; in float16, small gradients of logits would vanish before the loss is scaled.
        boost = torch.ldexp(torch.ones_like(factors[0]), -torch.frexp(factors.abs().max()).exponent)
        of_states, of_weight = (  # wide: the parts' gradients are summed
            torch.zeros_like(x, dtype=wide_dtype(x.dtype)) if needed else None
            for x, needed in zip((states, weight), ctx.needs_input_grad[:2], strict=True)
        )
        for part in ctx.parts:
            with torch.autocast(states.device.type, **ctx.autocast):
                logits = F.linear(states[part], weight).requires_grad_()  # [a, vocabulary]
                with torch.enable_grad():
                    found = torch.stack(ctx.work.sums(logits, part))
                    (gradient,) = torch.autograd.grad(found @ (factors * boost), logits)  # [a, vocabulary]
                sums += found.detach()
                if of_states is not None:
                    of_states[part] = gradient @ weight
                if of_weight is not None:
                    of_weight += gradient.T @ states[part]
        return sums, [None if g is None else g.div_(boost) for g in (of_states, of_weight)]


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


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)
