"""The credit of every answer as a short text, so that a baseline in git can be compared question by question."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from device_bench.evaluate import task
from device_bench.tasks.base import Sample, digest
from vlm.errors import UserError

STEPS = "0123456789X"  # tenths of a credit; X is a whole one


def pack(samples: Sequence[Sample]) -> dict[str, dict[str, str]]:
    """For each family the digest of its questions and one character per answer, in the order of the questions' ids."""
    packed = {}
    for family in sorted({sample.family for sample in samples}):
        members = _ordered(samples, family)
        credit = "".join(STEPS[round(10 * sample.correct)] for sample in members)
        packed[family] = {"questions": _digest(members), "credit": credit}
    return packed


def unpack(packed: dict[str, Any], answered: Sequence[Sample]) -> list[Sample]:
    """The answers that were packed, as far as scores need them: the questions of other answers with the packed credit.

    Args:
        packed: from `pack`.
        answered: answers to the same questions.
    Returns:
        Samples without answer texts; `parsed` is what scores read in them.
    Raises:
        UserError: the questions are others, or the text is damaged.
    """
    if packed.keys() != {sample.family for sample in answered}:
        raise UserError("the baseline's answers are of other benchmarks. Measure both on the same ones.")
    restored: list[Sample] = []
    for family, entry in packed.items():
        members = _ordered(answered, family)
        if entry["questions"] != _digest(members) or len(entry["credit"]) != len(members):
            raise UserError(f"{family}: the baseline's answers are to other questions. Measure both on the same ones.")
        for sample, step in zip(members, entry["credit"], strict=True):
            if step not in STEPS:
                raise UserError(f"{family}: credit {step!r} in the baseline, one of {STEPS} expected. Write it anew.")
            restored.append(_restored(sample, STEPS.index(step) / 10))
    return restored


def _restored(sample: Sample, credit: float) -> Sample:
    """POPE counts what was said, not only whether it was right; of two words the other one is the wrong one."""
    said = ""
    if sample.family == "pope":
        said = next(word for word in ("yes", "no") if task("pope").correct(word, sample.truth) == credit)
    return replace(sample, answer="", parsed=said, correct=credit, ms=0.0, vision_ms=0.0, tokens=0, problem="")


def _ordered(samples: Sequence[Sample], family: str) -> list[Sample]:
    return sorted((sample for sample in samples if sample.family == family), key=lambda sample: sample.id)


def _digest(samples: Sequence[Sample]) -> str:
    return digest(["\t".join((s.id, s.prompt, str(s.truth), *s.options)) for s in samples])
