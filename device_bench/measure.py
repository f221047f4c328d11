"""Statistics of timings, and the latency pass that collects them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from vlm.config import Config
from vlm.errors import UserError
from vlm.runtimes.base import Runtime, Timings


class Stats(Config):
    """Summary of n samples, in their unit.

    With n = 20 the 99th percentile lies between the two largest samples: read p99 together with n. Of a rate (tokens
    per second) the slow end is `min`, not p99.
    """

    p50: float
    p90: float
    p95: float
    p99: float
    min: float
    max: float
    mean: float
    std: float  # of the samples themselves: divided by n
    mad: float  # median distance from the median
    cv: float  # std over mean
    n: int


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Percentile of ascending samples, interpolated linearly (Hyndman and Fan's type 7, NumPy's default).

    Args:
        ordered: one or more samples, ascending.
        percent: 0 to 100.
    """
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(samples: Sequence[float]) -> Stats:
    """Summarise one or more samples.

    Raises:
        ValueError: there are none; what was not measured has no statistics.
    """
    if not samples:
        raise ValueError("no samples to summarise")
    ordered = sorted(float(sample) for sample in samples)
    n = len(ordered)
    mean, median = sum(ordered) / n, percentile(ordered, 50)
    std = (sum((sample - mean) ** 2 for sample in ordered) / n) ** 0.5
    return Stats(
        p50=median,
        p90=percentile(ordered, 90),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
        min=ordered[0],
        max=ordered[-1],
        mean=mean,
        std=std,
        mad=percentile(sorted(abs(sample - median) for sample in ordered), 50),
        cv=std / mean if mean else 0.0,
        n=n,
    )


@dataclass(frozen=True)
class Work:
    """The fixed request of the latency pass: the same picture, question and number of decode steps every time."""

    image: Image.Image
    question: str
    decode_tokens: int


def run_once(runtime: Runtime, work: Work) -> Timings:
    """Answer the fixed request once, with exactly `decode_tokens` decode steps after the first token.

    The runtime's own answering loop is timed, with the end token switched off: what is measured is what users run.

    Raises:
        UserError: prompt and decode steps do not fit into the context.
    """
    needed = len(runtime.prompt(work.question)) + work.decode_tokens + 1
    if needed > (room := runtime.facts.context_length):
        raise UserError(
            f"{runtime.folder}: context length {room} found, {needed} needed for the prompt and {work.decode_tokens} "
            "decode steps. Lower decode_tokens or export with a larger context_length."
        )
    facts = runtime.facts
    runtime.facts = replace(facts, eos_id=-1)
    try:
        return runtime.answer(work.image, work.question, work.decode_tokens + 1).timings
    finally:
        runtime.facts = facts


def latency_pass(
    runtime: Runtime,
    work: Work,
    warmup: int,
    iterations: int,
    on_progress: Callable[[float], None],
    min_seconds: float = 0,
) -> dict[str, list[float]]:
    """Time the request `iterations` times after `warmup` discarded ones, and on until `min_seconds` have passed.

    Returns:
        Raw samples in milliseconds, one per iteration (`decode_ms`: one per decode step), and `prefill_tokens`.
    """
    samples: dict[str, list[float]] = {
        name: [] for name in ("preprocess_ms", "vision_ms", "prefill_ms", "prefill_tokens", "ttft_ms", "decode_ms")
    }
    for index in range(warmup):
        run_once(runtime, work)
        on_progress((index + 1) / (warmup + iterations))
    start, done = time.monotonic(), 0
    while done < iterations or time.monotonic() - start < min_seconds:
        timings = run_once(runtime, work)
        done += 1
        on_progress(min(1.0, (warmup + done) / (warmup + iterations)))
        for name, values in samples.items():
            taken = getattr(timings, name)
            values.extend(round(ms, 4) for ms in (taken if isinstance(taken, list) else [float(taken)]))
    return samples


def latency_stats(samples: dict[str, list[float]]) -> dict[str, Stats]:
    """Summarise a latency pass: vision_ms, ttft_ms, prefill_tok_s and decode_tok_s, each over the iterations.

    ttft_ms runs from the picture in memory to the first token. A rate is an iteration's tokens over its seconds.
    """
    iterations = len(samples["ttft_ms"])
    steps = len(samples["decode_ms"]) // iterations
    decode_ms = [sum(samples["decode_ms"][i * steps : (i + 1) * steps]) for i in range(iterations)]
    prefill = zip(samples["prefill_tokens"], samples["prefill_ms"], strict=True)
    return {
        "vision_ms": summarise(samples["vision_ms"]),
        "ttft_ms": summarise(samples["ttft_ms"]),
        "prefill_tok_s": summarise([tokens / ms * 1e3 for tokens, ms in prefill]),
        "decode_tok_s": summarise([steps / ms * 1e3 for ms in decode_ms]),
    }
