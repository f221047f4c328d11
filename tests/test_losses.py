"""Each term equals its plain float64 formula, reaches the student and its adapter, and says when it is useless."""

import pytest
import torch

from distill.history import reports
from distill.losses.attention import DISTANCES
from distill.losses.logits import forward_kl, reverse_kl
from distill.losses.vision import focus_scores, vision_mse


def _attention(heads: int, rows: int = 5, columns: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, heads, rows, columns, generator=generator, dtype=torch.float64).softmax(-1) * 0.6


ROWS = torch.tensor([[True] * 5, [True, True, False, False, False]])


def _formula(kind: str, teacher: torch.Tensor, student: torch.Tensor, head_map: torch.Tensor) -> float:
    total, count = 0.0, 0
    mix = head_map.softmax(-1) if kind == "kl" else head_map
    for b in range(2):
        for m in range(5):
            if not ROWS[b, m]:
                continue
            for s in range(student.shape[1]):
                p = sum(float(mix[s, h]) * teacher[b, h, m] for h in range(teacher.shape[1]))
                q = student[b, s, m]
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
    teacher, student, head_map = _attention(4), _attention(3, seed=1), torch.randn(3, 4, dtype=torch.float64)
    found = DISTANCES[kind](teacher, student, head_map, ROWS)
    assert float(found) == pytest.approx(_formula(kind, teacher, student, head_map), rel=1e-9)


@pytest.mark.parametrize("kind", sorted(DISTANCES))
def test_attention_gradients_equal_finite_differences(kind: str) -> None:
    teacher = _attention(4)
    student, head_map = (
        _attention(3, seed=1).requires_grad_(),
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda s, w: DISTANCES[kind](teacher, s, w, ROWS), (student, head_map))


def test_vision_term_equals_its_formula_and_reaches_the_student() -> None:
    teacher, student = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    student.requires_grad_()
    scores = focus_scores(_attention(4), ROWS)
    found = vision_mse(teacher, student, scores, 3, 0.1)
    expected = float(((teacher - student.detach()) ** 2).mean())
    picked = [((teacher - student)[i, scores[i].topk(3).indices] ** 2).mean() for i in range(2)]
    assert float(found) == pytest.approx(expected + 0.1 * float(sum(picked)) / 2, rel=1e-9)
    assert torch.autograd.gradcheck(lambda s: vision_mse(teacher, s, scores, 3, 0.1), (student,))


def test_vision_term_of_a_batch_without_images_is_zero() -> None:
    nothing = torch.zeros(0, 7, 4, requires_grad=True)
    assert float(vision_mse(torch.zeros(0, 7, 4), nothing, torch.zeros(0, 7), 3, 0.1).detach()) == 0.0


def test_focus_scores_sum_over_real_text_rows_only() -> None:
    attention = _attention(4)
    scores = focus_scores(attention, ROWS)
    assert scores[1].tolist() == pytest.approx(attention[1, :, :2].sum(1).mean(0).tolist())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_terms_equal_torch_kl(temperature: float) -> None:
    teacher, student = torch.randn(6, 9), torch.randn(6, 9)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    scale = temperature**2
    assert float(forward_kl(teacher, student, temperature)) == pytest.approx(
        scale * float((p * (p / q).log()).sum(-1).mean()), rel=1e-4
    )
    assert float(reverse_kl(teacher, student, temperature)) == pytest.approx(
        scale * float((q * (q / p).log()).sum(-1).mean()), rel=1e-4
    )


def _history(values: list[float], norm: float) -> list[dict]:
    sup = {"value": 1.0, "grad_norm": 1.0, "weight": 1.0}
    return [{"terms": {"sup": sup, "attention": {"value": v, "grad_norm": norm, "weight": 1.0}}} for v in values]


def test_a_term_that_does_nothing_or_collapses_is_reported() -> None:
    assert "does nothing" in reports(_history([1e-3, 9e-4], norm=1e-4))[0]
    assert "collapsed" in reports(_history([1e-3, 1e-12], norm=0.3))[0]
    assert reports(_history([1.0, 0.5], norm=0.3)) == []
