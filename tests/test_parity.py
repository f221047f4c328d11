"""The parity ladder lets the right model pass and stops a wrong one, however small the error looks."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import export.parity
from export.parity import TIE, TorchReference, climb, measure
from export.probes import Probe, scene_probes
from tests.broken_engines import ClassTokenLast
from vlm.manifest import Parity, Rung
from vlm.models.checkpoint import Checkpoint, load_checkpoint
from vlm.runtimes.base import VisionOutput
from vlm.runtimes.torch import TorchRuntime

PROBES = scene_probes(3)
ANSWER = 6  # tokens; random models never end by themselves


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.parity, "MAX_NEW_TOKENS", ANSWER)


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    torch.set_num_threads(1)
    return load_checkpoint(random_checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> TorchReference:
    return TorchReference(TorchRuntime(checkpoint))


class ForgetsOneStep(TorchRuntime):
    """A cache that is not written in single-token steps: the prompt alone is right."""

    def forward(self, embeds: np.ndarray) -> np.ndarray:
        before = copy.deepcopy(self.cache)
        logits = super().forward(embeds)
        if len(embeds) == 1:
            self.cache = before
        return logits


class NotANumber(TorchRuntime):
    def forward(self, embeds: np.ndarray) -> np.ndarray:
        return np.full_like(super().forward(embeds), np.nan)


class WrongOnOneQuestion(TorchRuntime):
    """Right on all probes but the last."""

    def embed(self, ids: list[int]) -> np.ndarray:
        is_last = len(ids) > 1 and ids == [0 if i == 3 else i for i in self._last_prompt()]
        return super().embed(ids) + (0.1 if is_last else 0.0)

    def _last_prompt(self) -> list[int]:
        image = self.facts.image_token_id
        return [3 if i == image else i for i in self.prompt(PROBES[-1].question)]


class Ours(TorchRuntime):
    """An engine that does not expose patch features."""

    def encode_image(self, pixels: np.ndarray) -> VisionOutput:
        return VisionOutput(None, super().encode_image(pixels).tokens)


class OtherPixels(TorchRuntime):
    """Crops instead of padding: only pictures that are not square show it."""

    def pixels(self, image: object) -> np.ndarray:
        side = min(image.size)  # type: ignore[attr-defined]
        return super().pixels(image.crop((0, 0, side, side)))  # type: ignore[attr-defined]


def failed(parity: Parity) -> set[str]:
    return {rung.name for rung in parity.rungs if not rung.passed}


def rung(parity: Parity, name: str, metric: str, source: str = "float") -> Rung:
    return next(r for r in parity.rungs if (r.name, r.metric, r.reference) == (name, metric, source))


def test_the_model_itself_passes_every_rung(checkpoint: Checkpoint, reference: TorchReference) -> None:
    parity = climb(TorchRuntime(checkpoint), "fp32", reference, None, PROBES)
    assert parity.passed and not failed(parity)
    assert [r.name for r in parity.rungs] == ["pixels", "vision", "projector", "logits", "logits", "logits", "tokens"]
    assert parity.token_agreement == 1.0 and parity.first_divergence is None and parity.probes == 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_class_token_at_the_wrong_end_is_seen_at_the_vision_tower(
    checkpoint: Checkpoint, reference: TorchReference, precision: str
) -> None:
    parity = climb(ClassTokenLast(checkpoint), precision, reference, None, PROBES)
    assert not parity.passed and {"vision", "projector"} <= failed(parity)


@pytest.mark.parametrize("part", ["language_model.layers", "vision_tower.encoder.layers"])
def test_a_dropped_layer_fails_even_for_an_integer_artifact(
    checkpoint: Checkpoint, reference: TorchReference, part: str
) -> None:
    model = copy.deepcopy(checkpoint.model)
    layers = model.model.get_submodule(part)
    del layers[0]
    if part.startswith("language"):
        layers[0].self_attn.layer_idx = 0
    parity = climb(TorchRuntime(replace(checkpoint, model=model)), "int4", reference, reference, PROBES)
    assert not parity.passed
    assert "logits" in failed(parity) and ("vision" in failed(parity)) == part.startswith("vision")


def test_an_unwritten_cache_fails_although_the_first_token_is_right(
    checkpoint: Checkpoint, reference: TorchReference
) -> None:
    parity = climb(ForgetsOneStep(checkpoint), "fp32", reference, None, PROBES)
    assert "logits" in failed(parity)
    assert parity.first_divergence is None or parity.first_divergence > 0


def test_one_wrong_probe_fails_however_many_are_right(checkpoint: Checkpoint, reference: TorchReference) -> None:
    runtime = WrongOnOneQuestion(checkpoint)
    assert climb(runtime, "fp32", reference, None, PROBES[:-1]).passed
    assert "logits" in failed(climb(runtime, "fp32", reference, None, PROBES))


def test_what_is_not_a_number_fails(checkpoint: Checkpoint, reference: TorchReference) -> None:
    assert "logits" in failed(climb(NotANumber(checkpoint), "int4", reference, reference, PROBES[:1]))


def test_preprocessing_is_compared_on_pictures_that_are_not_square(
    checkpoint: Checkpoint, reference: TorchReference
) -> None:
    assert failed(climb(OtherPixels(checkpoint), "fp32", reference, None, PROBES[:1])) == {"pixels"}


def test_unexposed_features_are_said_and_the_vision_tokens_judge(
    checkpoint: Checkpoint, reference: TorchReference
) -> None:
    parity = climb(Ours(checkpoint), "f16", reference, None, PROBES[:1])
    vision = rung(parity, "vision", "cosine")
    assert vision.value is None and "does not expose" in vision.note and parity.passed
    assert parity.vision_cos == rung(parity, "projector", "cosine").value


def test_an_integer_artifact_is_judged_against_its_own_weights_and_recorded_against_the_floats(
    checkpoint: Checkpoint, reference: TorchReference
) -> None:
    model = copy.deepcopy(checkpoint.model)
    with torch.no_grad():
        model.lm_head.weight += 0.05 * torch.randn_like(model.lm_head.weight)
    rounded = replace(checkpoint, model=model)
    parity = climb(TorchRuntime(rounded), "int4", reference, TorchReference(TorchRuntime(rounded)), PROBES)
    assert parity.passed
    near, far = (rung(parity, "logits", "cosine", source) for source in ("dequantized", "float"))
    assert near.bar == 0.998 and near.value is not None and near.value == parity.logits_cos == pytest.approx(1.0)
    assert far.bar is None and far.value is not None and far.value < 0.95
    # The same artifact without its own weights as reference is a wrong float model.
    assert "logits" in failed(climb(TorchRuntime(rounded), "fp32", reference, None, PROBES))


def test_a_choice_between_tied_tokens_is_no_divergence(checkpoint: Checkpoint) -> None:
    def distance(gap: float) -> int | None:
        class Fixed(TorchRuntime):
            first, second = 0.0, 0.0

            def forward(self, embeds: np.ndarray) -> np.ndarray:
                logits = np.zeros_like(super().forward(embeds))
                logits[7], logits[9] = 5.0 + self.first, 5.0 + self.second
                return logits

        ours, theirs = Fixed(checkpoint), Fixed(checkpoint)
        theirs.first, ours.second = gap, 1e-4
        return measure(ours, TorchReference(theirs), PROBES[0]).divergence

    assert distance(TIE / 2) is None
    assert distance(TIE * 2) == 0


def test_what_follows_a_tie_is_compared_and_ties_are_counted(checkpoint: Checkpoint) -> None:
    class Scripted(TorchRuntime):
        """Chooses between tokens 7 and 9 by a gap per position."""

        gaps: tuple[float, ...] = ()

        def forward(self, embeds: np.ndarray) -> np.ndarray:
            logits = np.zeros_like(super().forward(embeds))
            self.position = 0 if len(embeds) > 1 else self.position + 1
            logits[7], logits[9] = 5.0 + self.gaps[self.position], 5.0
            return logits

    ours, theirs = Scripted(checkpoint), Scripted(checkpoint)
    theirs.gaps = (TIE / 2, 1.0, TIE / 2, 1.0, 1.0, 1.0)
    ours.gaps = (-1.0, 1.0, -1.0, -1.0, 1.0, 1.0)
    found = measure(ours, TorchReference(theirs), PROBES[0])
    assert (found.divergence, found.ties) == (3, 2)
    parity = climb(ours, "fp32", TorchReference(theirs), None, PROBES[:1])
    assert parity.ties == 2 and parity.token_agreement == 0.0
    assert "2 ties were broken the other way" in rung(parity, "tokens", "agreement").note


def test_the_reference_answers_each_probe_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = TorchRuntime(checkpoint)
    calls: list[int] = []
    encode = runtime.encode_image
    monkeypatch.setattr(runtime, "encode_image", lambda pixels: calls.append(1) or encode(pixels))
    reference = TorchReference(runtime)
    first = reference.trace(PROBES[0])
    assert reference.trace(PROBES[0]) is first and len(calls) == 1
    assert len(first.tokens) == len(first.logits) <= ANSWER


def test_probes_are_the_same_every_time_and_ask_every_family_and_a_caption() -> None:
    again = scene_probes(12)
    questions = [probe.question for probe in again]
    assert questions == [probe.question for probe in scene_probes(12)]
    assert np.array_equal(np.asarray(again[5].image), np.asarray(scene_probes(12)[5].image))
    assert questions[3] == "Describe the image." and len(set(questions)) > 8


def test_a_probe_is_equal_only_to_itself() -> None:
    image = PROBES[0].image
    assert Probe(image, "What?") != Probe(image, "What?")
