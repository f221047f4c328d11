"""L_KL: the teacher's distribution over answer tokens (Align-KD eq. 6, after MiniLLM)."""

from torch import Tensor


def reverse_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of sum p_S log(p_S / p_T), times temperature squared.

    Args:
        teacher: logits of the teacher, [A, vocabulary].
        student: logits of the student, [A, vocabulary].
        temperature: divides both logits.
    """
    log_t, log_s = _log_probabilities(teacher, student, temperature)
    return (log_s.exp() * (log_s - log_t)).sum(-1).mean() * temperature**2


def forward_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of sum p_T log(p_T / p_S), times temperature squared. Arguments as `reverse_kl`."""
    log_t, log_s = _log_probabilities(teacher, student, temperature)
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean() * temperature**2


DISTANCES = {"reverse_kl": reverse_kl, "forward_kl": forward_kl}


def _log_probabilities(teacher: Tensor, student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return (teacher.float() / temperature).log_softmax(-1), (student.float() / temperature).log_softmax(-1)
