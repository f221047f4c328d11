"""The parity ladder lets the right model pass and stops a wrong one, however small the error looks."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import export.parity
import export.run
from export.config import ExportConfig
from export.formats.base import Written
from export.graph import VisionEncoder
from export.parity import TIE, Reference, climb, measure
from export.probes import Probe, scene_probes
from export.run import export_one, parse_target, run
from vlm.errors import CheckFailed, UserError
from vlm.manifest import Manifest, Parity, Precision, Rung, read_manifest
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
def reference(checkpoint: Checkpoint) -> Reference:
    return Reference(TorchRuntime(checkpoint))


class ClassTokenLast(TorchRuntime):
    """Stock llama.cpp's error: the class token comes last, so patches are shifted by one."""

    def encode_image(self, pixels: np.ndarray) -> VisionOutput:
        tower = self.model.model.vision_tower
        embeds = tower.embeddings(torch.from_numpy(pixels)).roll(-1, 1)  # [1, 1 + P, vision_dim]
        with torch.inference_mode():
            x = tower.pre_layrnorm(embeds)
            for layer in tower.encoder.layers[:-1]:
                x = layer(x, attention_mask=None)
            tokens = self.model.model.multi_modal_projector(x[:, 1:])  # [1, V, D]
        return VisionOutput(x[0, 1:].numpy(), tokens[0].numpy())


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


def test_the_model_itself_passes_every_rung(checkpoint: Checkpoint, reference: Reference) -> None:
    parity = climb(TorchRuntime(checkpoint), "fp32", reference, None, PROBES)
    assert parity.passed and not failed(parity)
    assert [r.name for r in parity.rungs] == ["pixels", "vision", "projector", "logits", "logits", "logits", "tokens"]
    assert parity.token_agreement == 1.0 and parity.first_divergence is None and parity.probes == 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_class_token_at_the_wrong_end_is_seen_at_the_vision_tower(
    checkpoint: Checkpoint, reference: Reference, precision: str
) -> None:
    parity = climb(ClassTokenLast(checkpoint), precision, reference, None, PROBES)
    assert not parity.passed and {"vision", "projector"} <= failed(parity)


@pytest.mark.parametrize("part", ["language_model.layers", "vision_tower.encoder.layers"])
def test_a_dropped_layer_fails_even_for_an_integer_artifact(
    checkpoint: Checkpoint, reference: Reference, part: str
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
    checkpoint: Checkpoint, reference: Reference
) -> None:
    parity = climb(ForgetsOneStep(checkpoint), "fp32", reference, None, PROBES)
    assert "logits" in failed(parity)
    assert parity.first_divergence is None or parity.first_divergence > 0


def test_one_wrong_probe_fails_however_many_are_right(checkpoint: Checkpoint, reference: Reference) -> None:
    runtime = WrongOnOneQuestion(checkpoint)
    assert climb(runtime, "fp32", reference, None, PROBES[:-1]).passed
    assert "logits" in failed(climb(runtime, "fp32", reference, None, PROBES))


def test_what_is_not_a_number_fails(checkpoint: Checkpoint, reference: Reference) -> None:
    assert "logits" in failed(climb(NotANumber(checkpoint), "int4", reference, reference, PROBES[:1]))


def test_preprocessing_is_compared_on_pictures_that_are_not_square(
    checkpoint: Checkpoint, reference: Reference
) -> None:
    assert failed(climb(OtherPixels(checkpoint), "fp32", reference, None, PROBES[:1])) == {"pixels"}


def test_unexposed_features_are_said_and_the_vision_tokens_judge(checkpoint: Checkpoint, reference: Reference) -> None:
    parity = climb(Ours(checkpoint), "f16", reference, None, PROBES[:1])
    vision = rung(parity, "vision", "cosine")
    assert vision.value is None and "does not expose" in vision.note and parity.passed
    assert parity.vision_cos == rung(parity, "projector", "cosine").value


def test_an_integer_artifact_is_judged_against_its_own_weights_and_recorded_against_the_floats(
    checkpoint: Checkpoint, reference: Reference
) -> None:
    model = copy.deepcopy(checkpoint.model)
    with torch.no_grad():
        model.lm_head.weight += 0.05 * torch.randn_like(model.lm_head.weight)
    rounded = replace(checkpoint, model=model)
    parity = climb(TorchRuntime(rounded), "int4", reference, Reference(TorchRuntime(rounded)), PROBES)
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
        return measure(ours, Reference(theirs), PROBES[0]).divergence

    assert distance(TIE / 2) is None
    assert distance(TIE * 2) == 0


def test_the_reference_answers_each_probe_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = TorchRuntime(checkpoint)
    calls: list[int] = []
    encode = runtime.encode_image
    monkeypatch.setattr(runtime, "encode_image", lambda pixels: calls.append(1) or encode(pixels))
    reference = Reference(runtime)
    first = reference.trace(PROBES[0])
    assert reference.trace(PROBES[0]) is first and len(calls) == 1
    assert len(first.tokens) == len(first.logits) <= ANSWER


def test_probes_are_the_same_every_time_and_ask_every_family_and_a_caption() -> None:
    again = scene_probes(12)
    questions = [probe.question for probe in again]
    assert questions == [probe.question for probe in scene_probes(12)]
    assert np.array_equal(np.asarray(again[5].image), np.asarray(scene_probes(12)[5].image))
    assert questions[3] == "Describe the image." and len(set(questions)) > 8


class StubFormat:
    """A format whose artifact is torch itself with an optional error, so that the stage can be tested fast."""

    ENGINE = "onnx"
    PRECISIONS = ("fp32",)

    def __init__(self, runtime: type[TorchRuntime]) -> None:
        self.runtime = runtime

    def write(self, checkpoint: Checkpoint, precision: str, folder: Path, context_length: int) -> Written:
        (folder / "weights.bin").write_bytes(b"weights")
        self.opened = checkpoint
        return Written(Precision(vision="fp32", projector="fp32", embedding="fp32", decoder="fp32"), {"layers": 2})

    def dequantized(self, checkpoint: Checkpoint, precision: str, folder: Path) -> None:
        return None

    def open(self, folder: Path, threads: int) -> TorchRuntime:
        read_manifest(folder, checksums=True)
        return self.runtime(self.opened)


def plant(monkeypatch: pytest.MonkeyPatch, runtime: type[TorchRuntime]) -> None:
    stub = StubFormat(runtime)
    monkeypatch.setattr(export.run, "load", lambda package, name: stub)
    monkeypatch.setattr(export.run, "open_runtime", stub.open)


CONFIG = ExportConfig(targets=["onnx:fp32"], probes=2, threads=1)


def test_an_artifact_is_complete_and_proven(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, TorchRuntime)
    said: list[str] = []
    (folder,) = run(CONFIG, random_checkpoint, tmp_path, said.append)
    manifest: Manifest = read_manifest(folder, checksums=True)
    assert folder == tmp_path / "onnx-fp32" and [f.path for f in manifest.files] == ["tokenizer.json", "weights.bin"]
    assert manifest.parity is not None and manifest.parity.passed and not manifest.parity.allowed_drift
    assert "torch" in manifest.versions and manifest.context_length == 512
    assert said[0] == "onnx-fp32: writing" and "done" in said[-1]


def test_a_failing_export_names_rung_value_and_bar_and_leaves_no_artifact(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, TorchRuntime)
    run(CONFIG, random_checkpoint, tmp_path)
    plant(monkeypatch, ClassTokenLast)
    with pytest.raises(CheckFailed, match=r"(?s)onnx-fp32.*vision cosine \S+, bar 0\.9999.*--allow-drift"):
        run(CONFIG, random_checkpoint, tmp_path)
    assert not (tmp_path / "onnx-fp32").exists()


def test_allowed_drift_is_kept_and_written_down(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, ClassTokenLast)
    folder = export_one(random_checkpoint, "onnx:fp32", tmp_path, CONFIG.model_copy(update={"allow_drift": True}))
    parity = read_manifest(folder).parity
    assert parity is not None and parity.allowed_drift and not parity.passed


def test_a_wrong_graph_in_a_real_export_is_stopped(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    import export.formats.onnx as onnx_format

    class OneLayerLess(VisionEncoder):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__(model)  # type: ignore[arg-type]
            self.layers = self.layers[:-1]

    monkeypatch.setattr(onnx_format, "VisionEncoder", OneLayerLess)
    with pytest.raises(CheckFailed, match="vision cosine"):
        export_one(random_checkpoint, "onnx:int4", tmp_path, CONFIG)
    assert not (tmp_path / "onnx-int4").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("onx:fp32", "unknown format 'onx'. Did you mean 'onnx'"),
        ("onnx:int44", "unknown precision 'int44'. Did you mean 'int4'.*onnx:fp32"),
        ("onnx", "No precision was given.*onnx:int4"),
    ],
)
def test_an_unknown_target_is_answered_with_a_suggestion(target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_target(target)


def test_a_wrong_target_stops_before_any_work(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(ExportConfig(targets=["onnx:fp32", "onnx:int44"]), random_checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_context_longer_than_the_models_is_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"context_length=1024.*at most 512"):
        run(CONFIG.model_copy(update={"context_length": 1024}), random_checkpoint, tmp_path)


def test_a_probe_is_equal_only_to_itself() -> None:
    image = PROBES[0].image
    assert Probe(image, "What?") != Probe(image, "What?")
