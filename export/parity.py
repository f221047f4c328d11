"""Parity: an artifact climbs a ladder beside the torch model: pixels, vision, projector, logits, greedy tokens.

At each rung the worst value over all probes counts, not the mean, and a value that is not a number fails. Logits are
compared at every answer position by teacher forcing: the prompt is prefilled, then the reference's greedy answer goes
token by token through the artifact's own KV cache, also after a position where the artifact would have chosen another
one, so that no position is left uncompared. Up to the first difference this is the artifact's own greedy decoding, so
the same pass tells where its tokens diverge. Another choice between two tied tokens is no difference; ties are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import AutoProcessor

from export.probes import Probe
from vlm.bars import PIXEL_BAR, TOKEN_BAR, cosine_bar, is_float
from vlm.manifest import Parity, Rung
from vlm.runtimes.base import Runtime, VisionOutput

MAX_NEW_TOKENS = 24
# Two tokens whose reference logits differ by less are tied: rounding of floats may choose either.
TIE = 0.02
# Shapes in which each picture is shown to the preprocessing besides its own, so that padding and resizing count.
WIDE, TALL = (150, 110), (70, 130)

UNEXPOSED = "the engine does not expose patch features"

Weights = Literal["float", "dequantized"]


@dataclass(frozen=True)
class Trace:
    """What a reference does with one probe.

    Attributes:
        vision: patch features [P, vision_dim] and vision tokens [V, D].
        tokens: the greedy answer with its end token.
        logits: row i is what token i was chosen from, [A, vocabulary].
    """

    vision: VisionOutput
    tokens: list[int]
    logits: np.ndarray


@dataclass(frozen=True)
class Distance:
    """How far an artifact is from a reference on one probe: cosines are the lowest, max_abs and kl the highest."""

    vision: float | None  # over patches; None where the engine does not expose its features
    projector: float  # over vision tokens
    logits: float  # over answer positions
    max_abs: float  # of the logits
    kl: float  # KL(reference || artifact) in nats, over answer positions
    divergence: int | None  # index of the first greedy token that differs, ties aside
    ties: int  # greedy tokens that differ where the reference's logits are tied


class TorchReference:
    """A torch runtime whose traces are computed once per probe, however many artifacts are compared with it.

    Args:
        runtime: the model in float32.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.folder = runtime.folder
        self._runtime: Runtime | None = runtime
        self._traces: dict[Probe, Trace] = {}

    def trace(self, probe: Probe) -> Trace:
        """Answer a probe greedily and keep what was computed on the way."""
        if probe not in self._traces:
            if self._runtime is None:
                raise ValueError("the reference knows only the probes it was closed with")
            self._traces[probe] = self._answer(self._runtime, probe)
        return self._traces[probe]

    def close(self, probes: Sequence[Probe]) -> None:
        """Trace the probes and let the model go, so that it does not stand in memory beside the artifact."""
        for probe in probes:
            self.trace(probe)
        self._runtime = None

    def _answer(self, runtime: Runtime, probe: Probe) -> Trace:
        vision = runtime.encode_image(runtime.pixels(probe.image))
        runtime.reset()
        rows = [runtime.forward(runtime.prompt_embeds(runtime.prompt(probe.question), vision))]
        tokens = [int(rows[0].argmax())]
        while tokens[-1] != runtime.facts.eos_id and len(tokens) < MAX_NEW_TOKENS:
            rows.append(runtime.forward(runtime.embed(tokens[-1:])))
            tokens.append(int(rows[-1].argmax()))
        return Trace(vision, tokens, np.stack(rows))


def climb(
    runtime: Runtime,
    precision: str,
    reference_float: TorchReference,
    reference_dequantized: TorchReference | None,
    probes: Sequence[Probe],
) -> Parity:
    """Measure every rung.

    Args:
        runtime: the artifact, opened from its folder.
        precision: the artifact's; says which bars apply and, for integer weights, that they apply against the
            dequantized reference, so that a wrong graph cannot hide behind rounding.
        reference_float: the checkpoint in torch.
        reference_dequantized: the same model with the weights the artifact really holds; None where they are the
            checkpoint's own.
        probes: the questions; at least one.
    """
    judge: Weights = "float" if is_float(precision) or reference_dequantized is None else "dequantized"
    references: list[tuple[Weights, TorchReference | None]] = [
        ("float", reference_float),
        ("dequantized", reference_dequantized),
    ]
    rungs = [_pixels(runtime, reference_float, probes)]
    summary: dict[str, Any] = {}
    for source, reference in sorted(references, key=lambda pair: pair[0] != judge):
        if reference is None:
            continue
        distances = [measure(runtime, reference, probe) for probe in probes]
        bar = cosine_bar(precision) if source == judge else None
        rungs += _rungs(distances, source, bar, TOKEN_BAR if is_float(precision) and source == judge else None)
        summary = summary or _summary(distances)
    return Parity(rungs=rungs, probes=len(probes), passed=all(rung.passed for rung in rungs), **summary)


def measure(runtime: Runtime, reference: TorchReference, probe: Probe) -> Distance:
    """Compare an artifact with a reference on one probe."""
    trace = reference.trace(probe)
    vision = runtime.encode_image(runtime.pixels(probe.image))
    logits = _forced_logits(runtime, vision, probe.question, trace.tokens)  # [A, vocabulary]
    ours, theirs = vision.features, trace.vision.features
    divergence, ties = _compare_tokens(logits, trace)
    return Distance(
        vision=None if ours is None or theirs is None else _cosine(ours, theirs),
        projector=_cosine(vision.tokens, trace.vision.tokens),
        logits=_cosine(logits, trace.logits),
        max_abs=float(np.abs(logits - trace.logits).max()),
        kl=float(np.max(_kl(trace.logits, logits))),
        divergence=divergence,
        ties=ties,
    )


def _forced_logits(runtime: Runtime, vision: VisionOutput, question: str, tokens: list[int]) -> np.ndarray:
    runtime.reset()
    rows = [runtime.forward(runtime.prompt_embeds(runtime.prompt(question), vision))]
    rows += [runtime.forward(runtime.embed([token])) for token in tokens[:-1]]
    return np.stack(rows)  # [A, vocabulary]


def _compare_tokens(logits: np.ndarray, trace: Trace) -> tuple[int | None, int]:
    """Index of the first token that the artifact would choose otherwise, and how often it only broke a tie."""
    chosen, rows = logits.argmax(-1), np.arange(len(trace.tokens))  # [A]
    gaps = trace.logits[rows, trace.tokens] - trace.logits[rows, chosen]  # [A]
    other = chosen != np.asarray(trace.tokens)
    tied = gaps < TIE  # [A]; false for NaN
    differing = np.flatnonzero(other & ~tied)
    return int(differing[0]) if len(differing) else None, int((other & tied).sum())


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Lowest cosine between the rows of a and b [N, D]; NaN if any of them holds one or has no length."""
    if a.shape != b.shape:
        return float("nan")
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))  # [N]
    return float(np.min(cosines))


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL divergence of the distributions with logits p and q [A, vocabulary]: [A]."""
    a, b = _log_softmax(p.astype(np.float64)), _log_softmax(q.astype(np.float64))
    return np.asarray((np.exp(a) * (a - b)).sum(-1))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def _pixels(runtime: Runtime, reference: TorchReference, probes: Sequence[Probe]) -> Rung:
    """Compare the artifact's pixels with those of the checkpoint's transformers processor."""
    processor = AutoProcessor.from_pretrained(reference.folder).image_processor
    errors = []
    for probe in probes:
        for image in (probe.image, probe.image.resize(WIDE), probe.image.resize(TALL)):
            theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"])  # [1, 3, S, S]
            errors.append(float(np.abs(runtime.pixels(image) - theirs).max()))
    worst = float(np.max(errors))
    return Rung(
        name="pixels", metric="max_abs", value=worst, bar=PIXEL_BAR, passed=worst <= PIXEL_BAR, reference="float"
    )


def _rungs(distances: list[Distance], source: Weights, bar: float | None, token_bar: float | None) -> list[Rung]:
    def rung(name: Any, metric: str, value: float | None, bar: float | None = None, note: str = "") -> Rung:
        passed = bar is None or value is None or value >= bar  # false for NaN
        return Rung(name=name, metric=metric, value=value, bar=bar, passed=passed, reference=source, note=note)

    vision = _worst_vision(distances)
    return [
        rung("vision", "cosine", vision, bar, UNEXPOSED if vision is None else ""),
        rung("projector", "cosine", float(np.min([d.projector for d in distances])), bar),
        rung("logits", "cosine", float(np.min([d.logits for d in distances])), bar),
        rung("logits", "max_abs", float(np.max([d.max_abs for d in distances]))),
        rung("logits", "kl", float(np.max([d.kl for d in distances]))),
        rung("tokens", "agreement", _agreement(distances), token_bar, _token_note(distances)),
    ]


def _summary(distances: list[Distance]) -> dict[str, Any]:
    """Parity's headline numbers, against the reference that judges; an unexposed vision tower shows in its tokens."""
    vision = _worst_vision(distances)
    return {
        "vision_cos": float(np.min([d.projector for d in distances])) if vision is None else vision,
        "logits_cos": float(np.min([d.logits for d in distances])),
        "kl": float(np.max([d.kl for d in distances])),
        "token_agreement": _agreement(distances),
        "first_divergence": min((d.divergence for d in distances if d.divergence is not None), default=None),
        "ties": sum(d.ties for d in distances),
    }


def _worst_vision(distances: list[Distance]) -> float | None:
    values = [d.vision for d in distances if d.vision is not None]
    return float(np.min(values)) if values else None


def _agreement(distances: list[Distance]) -> float:
    """Share of the answers whose greedy tokens are the reference's, all of them but for ties."""
    return sum(d.divergence is None for d in distances) / len(distances)


def _token_note(distances: list[Distance]) -> str:
    count, ties = sum(d.divergence is not None for d in distances), sum(d.ties for d in distances)
    said = [f"{count} of {len(distances)} answers differ"] if count else []
    said += [f"{ties} {'tie was' if ties == 1 else 'ties were'} broken the other way"] if ties else []
    return "; ".join(said)
