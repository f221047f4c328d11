"""Each term equals its plain float64 formula, and its gradients equal finite differences."""

import pytest
import torch

from distill.losses import logits
from distill.losses.attention import DISTANCES
from distill.losses.vision import focus_scores, instruction_rows, vision_mse, weighted_mse
from vlm.data.collator import IGNORE


def _attention(heads: int, rows: int = 5, columns: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, heads, rows, columns, generator=generator, dtype=torch.float64).softmax(-1) * 0.6


ROWS = torch.tensor([[True] * 5, [True, True, False, False, False]])
COLUMNS = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])  # the second sample has fewer vision tokens


def _block(heads: int, seed: int = 0) -> torch.Tensor:
    """A block as the probe gives it: zero in padding."""
    return _attention(heads, seed=seed) * (ROWS[:, None, :, None] & COLUMNS[:, None, None, :])


def _formula(kind: str, teacher: torch.Tensor, student: torch.Tensor, head_map: torch.Tensor) -> float:
    total, count = 0.0, 0
    mix = head_map.softmax(-1) if kind == "kl" else head_map
    for b in range(2):
        for m in range(5):
            if not ROWS[b, m]:
                continue
            for s in range(student.shape[1]):
                p = sum(float(mix[s, h]) * teacher[b, h, m] for h in range(teacher.shape[1]))
                p, q = p[COLUMNS[b]], student[b, s, m][COLUMNS[b]]
                if kind == "mse":
                    total += float(((p - q) ** 2).mean())
                elif kind == "kl":
                    p, q = (p + 1e-6) / (p + 1e-6).sum(), (q + 1e-6) / (q + 1e-6).sum()
                    total += float((p * (p / q).log()).sum())
                else:
                    total += 1 - float(p @ q / (p.norm() * q.norm()))
                count += 1
    return total / count


@pytest.mark.parametrize("kind", sorted(DISTANCES))
def test_attention_distance_equals_its_formula(kind: str) -> None:
    teacher, student, head_map = _block(4), _block(3, seed=1), torch.randn(3, 4, dtype=torch.float64)
    found = DISTANCES[kind](teacher, student, head_map, ROWS, COLUMNS[:, None])
    assert float(found) == pytest.approx(_formula(kind, teacher, student, head_map), rel=1e-9)


@pytest.mark.parametrize("kind", sorted(DISTANCES))
def test_attention_gradients_equal_finite_differences(kind: str) -> None:
    teacher, student = _block(4), _block(3, seed=1).requires_grad_()
    head_map = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    real = ROWS[:, None, :, None] & COLUMNS[:, None, None, :]
    assert torch.autograd.gradcheck(
        lambda s, w: DISTANCES[kind](teacher, s * real, w, ROWS, COLUMNS[:, None]), (student, head_map)
    )


@pytest.mark.parametrize("kind", sorted(DISTANCES))
def test_attention_of_a_batch_without_images_is_zero_with_a_gradient(kind: str) -> None:
    nothing = torch.zeros(2, 3, 0, 0, requires_grad=True)
    head_map = torch.randn(3, 4, requires_grad=True)
    none = torch.zeros(2, 0, dtype=torch.bool)
    value = DISTANCES[kind](torch.zeros(2, 4, 0, 0), nothing, head_map, none, none[:, None])
    value.backward()
    assert value.item() == 0 and head_map.grad is not None and not head_map.grad.any()


def test_vision_term_equals_its_formula_and_reaches_the_student() -> None:
    teacher, student = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    student.requires_grad_()
    scores = focus_scores(_attention(4), ROWS)
    found = vision_mse(teacher, student, scores, 3, 0.1)
    expected = float(((teacher - student.detach()) ** 2).mean())
    picked = [((teacher - student)[i, scores[i].topk(3).indices] ** 2).mean() for i in range(2)]
    assert float(found.detach()) == pytest.approx(expected + 0.1 * float(sum(picked)) / 2, rel=1e-9)
    assert torch.autograd.gradcheck(lambda s: vision_mse(teacher, s, scores, 3, 0.1), (student,))


def test_vision_term_of_a_batch_without_images_is_zero() -> None:
    nothing = torch.zeros(0, 7, 4, requires_grad=True)
    assert float(vision_mse(torch.zeros(0, 7, 4), nothing, torch.zeros(0, 7), 3, 0.1).detach()) == 0.0


def test_the_instructions_text_weights_the_vision_tokens() -> None:
    rows, mask = torch.tensor([[4, 5, 6, 7], [4, 5, 6, 0]]), torch.tensor([[True] * 4, [True] * 3 + [False]])
    labels = torch.full((2, 8), IGNORE)
    labels[0, 5:7] = 1  # predict the tokens 6 and 7
    labels[1, 3:6] = 1  # a caption: nothing asks
    assert instruction_rows(labels, rows, mask).tolist() == [[True, True, False, False], mask[1].tolist()]
    teacher, student = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    scores = torch.rand(2, 7, dtype=torch.float64)
    expected = sum(
        float(scores[i, n] / scores[i].sum() * ((teacher - student)[i, n] ** 2).mean() / 2)
        for i in range(2) for n in range(7)
    )  # fmt: skip
    assert float(weighted_mse(teacher, student, scores)) == pytest.approx(expected, rel=1e-9)
    uniform = torch.ones(2, 7, dtype=torch.float64)
    assert float(weighted_mse(teacher, student, uniform)) == pytest.approx(float(((teacher - student) ** 2).mean()))


def test_focus_scores_sum_over_real_text_rows_only() -> None:
    attention = _attention(4)
    scores = focus_scores(attention, ROWS)
    assert scores[1].tolist() == pytest.approx(attention[1, :, :2].sum(1).mean(0).tolist())


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum(-1)


def _expected(kind: str, p: torch.Tensor, q: torch.Tensor, a: float) -> torch.Tensor:
    middle = a * p + (1 - a) * q
    return {
        "reverse_kl": _kl(q, p),
        "forward_kl": _kl(p, q),
        "skew_kl": _kl(p, middle),
        "skew_reverse_kl": _kl(q, a * q + (1 - a) * p),
        "jsd": a * _kl(p, middle) + (1 - a) * _kl(q, middle),
    }[kind]


@pytest.mark.parametrize("part", [0.1, 0.5])
@pytest.mark.parametrize("kind", sorted(logits.DISTANCES))
def test_logits_distance_equals_its_formula(kind: str, part: float) -> None:
    teacher, student = torch.randn(2, 6, 9, dtype=torch.float64)
    student.requires_grad_()
    distance = logits.DISTANCES[kind]
    found = distance(teacher.log_softmax(-1), student.log_softmax(-1), part)
    expected = _expected(kind, teacher.softmax(-1), student.softmax(-1), part)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: distance(teacher.log_softmax(-1), s.log_softmax(-1), part), (student,))


def test_the_rest_of_a_distribution_is_one_more_token() -> None:
    probabilities = torch.tensor([[0.5, 0.2], [0.3, 0.3]], dtype=torch.float64)
    found = logits.with_rest(probabilities.log()).exp()
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.2, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64))
