"""GQA: exact match of a short answer.

Rules: GQA's own eval.py counts an answer that equals the gold answer, nothing else; LLaVA-1.5 and MobileVLM V2 hand
it the answer in lower case without full stops at the end (LLaVA scripts/convert_gqa_for_eval.py). VLMEvalKit differs
(vlmeval/dataset/utils/vqa_eval.py): it also strips spaces and lowers the gold answer, but keeps a full stop, so that
"red." is wrong there.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from device_bench.tasks.base import Sample, TaskScore, Truth, accuracy, credit_by, credit_counts, task_score

VERSION = "gqa-1"
counts, value = credit_counts, accuracy


def parse(answer: str, options: Sequence[str] = ()) -> str:
    """Lower case, full stops at the end removed."""
    return answer.rstrip(".").lower()


def correct(parsed: str, truth: Truth) -> float:
    """1 if the parsed answer is the truth."""
    return float(parsed == truth)


def chance(samples: Sequence[Sample]) -> float:
    """Percent right when each kind of question gets its most frequent answer."""
    kinds: dict[str, Counter[Truth]] = defaultdict(Counter)
    for sample in samples:
        kinds[sample.kind][sample.truth] += 1
    return 100 * sum(max(answers.values()) for answers in kinds.values()) / len(samples)


def score(samples: Sequence[Sample]) -> TaskScore:
    """Accuracy in percent; details: accuracy per kind."""
    details = {"kinds": credit_by(samples, lambda sample: sample.kind)}
    return task_score(samples, VERSION, counts, value, chance(samples), details)
