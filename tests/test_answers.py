"""Losses over the vocabulary in chunks equal the plain ones, values and gradients, and keep no logits of all tokens."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses import answers
from distill.losses.answers import Divergence, answer_losses, divergence_alone
from distill.losses.logits import DISTANCES
from distill.teacher.signals import Hidden, TopK
from vlm.data.collator import IGNORE

TOKENS, VOCABULARY = 13, 50
Case = tuple[Tensor, Tensor, nn.Linear, nn.Linear, Tensor]


def _case() -> Case:
    torch.manual_seed(0)
    states = torch.randn(TOKENS, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[3:6] = IGNORE
    ours, theirs = (nn.Linear(width, VOCABULARY, bias=False).double() for width in (8, 12))
    return states, labels, ours, theirs.requires_grad_(False), torch.randn(TOKENS, 12, dtype=torch.float64)


def _plain(case: Case, kind: str, temperature: float, part: float) -> tuple[Tensor, Tensor]:
    states, labels, ours, theirs, hidden = case
    logits = ours(states)
    log_p, log_q = (theirs(hidden) / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1)
    return F.cross_entropy(logits, labels), DISTANCES[kind](log_p, log_q, part).mean() * temperature**2


def _gradients(value: Tensor, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, (case[0], case[2].weight), retain_graph=True)


@pytest.mark.parametrize("kind", sorted(DISTANCES))
@pytest.mark.parametrize("rows", [1, 5, 13, 100])
@pytest.mark.parametrize("matrix", [True, False])
def test_chunks_equal_the_plain_loss(kind: str, rows: int, matrix: bool) -> None:
    case = _case()
    states, labels, ours, theirs, hidden = case
    head = ours if matrix else nn.Sequential(ours)  # the latter as LoRA's: the logits are made again
    divergence = Divergence(DISTANCES[kind], 0.3, 2.0)
    found = answer_losses(states, labels, head, VOCABULARY, Hidden(hidden, theirs), divergence, chunk=rows * VOCABULARY)
    for one, other in zip(found, _plain(case, kind, 2.0, 0.3), strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        for a, b in zip(_gradients(one, case), _gradients(other, case), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("matrix", [True, False])
def test_tokens_without_labels_have_the_divergence_alone(
    rows: int, matrix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "CHUNK", {"cpu": rows * VOCABULARY})
    case = _case()
    states, _, ours, theirs, hidden = case
    calls: list[int] = []
    theirs.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    divergence = Divergence(DISTANCES["forward_kl"], 0, 2.0)
    head = ours if matrix else nn.Sequential(ours)
    found = divergence_alone(states, head, VOCABULARY, Hidden(hidden, theirs), divergence)
    asked = len(calls)
    _, expected = _plain(case, "forward_kl", 2.0, 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    calls.clear()
    gradients = _gradients(3 * found, case)
    assert not matrix or (asked == -(-TOKENS // rows) and not calls)  # made in the forward pass, whatever the weight
    for one, other in zip(gradients, _gradients(3 * expected, case), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kept", [0, 4, TOKENS])
def test_the_head_is_called_as_often_as_in_the_process_with_most_tokens(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, labels, ours, theirs, hidden = _case()
    case = (states[:kept], labels[:kept], ours, VOCABULARY, Hidden(hidden[:kept], theirs))
    divergence = Divergence(DISTANCES["reverse_kl"], 0, 1.0)
    expected = answer_losses(*case, divergence)
    monkeypatch.setattr(answers, "_most", lambda count, device: 5)  # 4 tokens at a time: another has 17 to 20
    calls: list[int] = []
    ours.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    found = answer_losses(*case, divergence, chunk=4 * VOCABULARY, together=True)
    assert len(calls) == 5 and sum(calls) == kept
    for one, other in zip(found, expected, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(_weights(one, ours), _weights(other, ours), rtol=1e-10, atol=1e-14)
    calls.clear()
    torch.stack([value for value in found if value is not None]).sum().backward()
    assert len(calls) == 5  # made again in the backward pass, as in the other processes


def _weights(value: Tensor, head: nn.Linear) -> Tensor:
    return torch.autograd.grad(value, head.weight, retain_graph=True)[0]


@pytest.mark.parametrize("rows", [4, 100])
def test_the_likeliest_tokens_equal_the_plain_loss_when_the_rest_is_one_token(rows: int) -> None:
    case = _case()
    states, labels, ours, theirs, hidden = case
    log_p = theirs(hidden).log_softmax(-1)
    ids = torch.arange(VOCABULARY - 1).expand(TOKENS, -1)
    _, found = answer_losses(
        states, labels, ours, VOCABULARY, TopK(ids, log_p.gather(-1, ids)), Divergence(DISTANCES["forward_kl"], 0, 1.0),
        chunk=rows * VOCABULARY,
    )  # fmt: skip
    assert found is not None
    torch.testing.assert_close(found, _plain(case, "forward_kl", 1.0, 0)[1])


def test_without_a_teacher_there_is_only_the_cross_entropy() -> None:
    case = _case()
    found, nothing = answer_losses(*case[:3], VOCABULARY, chunk=2 * VOCABULARY)
    assert nothing is None
    torch.testing.assert_close(found, _plain(case, "reverse_kl", 1.0, 0)[0])


def test_a_batch_without_answers_is_zero_with_a_gradient() -> None:
    states, labels, ours, theirs, hidden = _case()
    divergence = Divergence(DISTANCES["reverse_kl"], 0, 1.0)
    teacher = Hidden(hidden[:0], theirs)
    ce, kl = answer_losses(states[:0], labels[:0], ours, VOCABULARY, teacher, divergence)
    assert kl is not None and ce.item() == kl.item() == 0
    (ce + kl).backward()
    assert ours.weight.grad is not None and not ours.weight.grad.any()


class Kept:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


@pytest.mark.parametrize("matrix", [True, False])
def test_no_logits_of_all_tokens_are_made_or_kept(matrix: bool) -> None:
    states, labels, ours, theirs, hidden = _case()
    head = ours if matrix else nn.Sequential(ours)
    widest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal widest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape[-1:] == (VOCABULARY,):
                widest = max(widest, result.numel())
            return result

    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(value: Tensor) -> Kept:
        saved = Kept(value)
        kept.add(saved)
        return saved

    with Watch(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.value):
        ce, kl = answer_losses(
            states, labels, head, VOCABULARY, Hidden(hidden, theirs), Divergence(DISTANCES["jsd"], 0.5, 1.0),
            chunk=2 * VOCABULARY,
        )  # fmt: skip
        assert kl is not None
    gc.collect()
    assert all(saved.value.shape[-1:] != (VOCABULARY,) for saved in kept)
    with Watch():
        (ce + kl).backward()
    assert widest == 2 * VOCABULARY


@pytest.mark.parametrize("weight", [0.5, torch.tensor(3.0)])
def test_gradients_for_the_expected_weight_are_made_in_the_forward_pass(weight: float | Tensor) -> None:
    case = _case()
    states, labels, ours, theirs, hidden = case
    calls: list[int] = []
    theirs.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    divergence = Divergence(DISTANCES["reverse_kl"], 0, 1.0, weight)
    ce, kl = answer_losses(states, labels, ours, VOCABULARY, Hidden(hidden, theirs), divergence, chunk=4 * VOCABULARY)
    assert kl is not None and len(calls) == 4
    found = _gradients(7 * (ce + weight * kl), case)  # 7: a loss scale
    assert len(calls) == 4  # the teacher's head was not asked again
    plain = _plain(case, "reverse_kl", 1.0, 0)
    for one, other in zip(found, _gradients(7 * (plain[0] + weight * plain[1]), case), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    calls.clear()
    _gradients(kl, case)
    assert len(calls) == 4  # of the divergence alone they are made anew


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_under_autocast_both_ways_agree(factor: float) -> None:
    states, labels, ours, theirs, hidden = _case()
    states, hidden = states.detach().float().requires_grad_(), hidden.float()
    ours, theirs = ours.float(), theirs.float()
    found = []
    for head in (ours, nn.Sequential(ours)):
        with torch.autocast("cpu", torch.bfloat16):
            ce, kl = answer_losses(
                states, labels, head, VOCABULARY, Hidden(hidden, theirs), Divergence(DISTANCES["reverse_kl"], 0, 1.0),
                chunk=4 * VOCABULARY,
            )  # fmt: skip
        assert kl is not None and ce.dtype == torch.float32
        found.append(torch.autograd.grad(ce + factor * kl, (states, ours.weight)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * float(other.abs().max()))


def test_small_gradients_do_not_vanish_in_float16() -> None:
    torch.manual_seed(0)
    tokens, vocabulary, scale = 12000, 2000, 2.0**13  # the mean's gradient of most logits is below float16's least
    states = torch.randn(tokens, 16, requires_grad=True)
    head, labels = nn.Linear(16, vocabulary, bias=False), torch.randint(vocabulary, (tokens,))
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            ce, _ = answer_losses(states, labels, head, vocabulary, chunk=2000 * vocabulary)
        found.append(torch.autograd.grad(ce * scale, (states, head.weight)))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 2e-3 * one.norm()
