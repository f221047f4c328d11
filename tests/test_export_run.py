"""The export stage leaves a complete and proven artifact, or none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export.parity
import export.run
from export.calibration import LayerInputs
from export.config import ExportConfig
from export.formats.base import Written
from export.graph import VisionEncoder
from export.run import export_one, parse_target, run
from pocketvlm.commands.export import show
from tests.broken_engines import ClassTokenLast
from vlm.errors import CheckFailed, UserError
from vlm.manifest import Manifest, Precision, read_manifest
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes.torch import TorchRuntime

ANSWER = 6  # tokens; random models never end by themselves


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.parity, "MAX_NEW_TOKENS", ANSWER)


class StubFormat:
    """A format whose artifact is torch itself with an optional error, so that the stage can be tested fast."""

    ENGINE = "onnx"
    PRECISIONS = ("fp32", "fp16")

    def __init__(self, runtime: type[TorchRuntime], failure: Exception | None) -> None:
        self.runtime, self.failure = runtime, failure

    def write(
        self, checkpoint: Checkpoint, precision: str, folder: Path, context_length: int, inputs: LayerInputs | None
    ) -> Written:
        (folder / "weights.bin").write_bytes(b"weights")
        if self.failure and precision == "fp16":
            raise self.failure
        self.opened = checkpoint
        return Written(Precision(vision="fp32", projector="fp32", embedding="fp32", decoder="fp32"), {"layers": 2})

    def dequantized(self, checkpoint: Checkpoint, precision: str, folder: Path) -> None:
        return None

    def open(self, folder: Path, threads: int) -> TorchRuntime:
        read_manifest(folder, checksums=True)
        return self.runtime(self.opened)


def plant(monkeypatch: pytest.MonkeyPatch, runtime: type[TorchRuntime], failure: Exception | None = None) -> None:
    """Let `failure` be what comes of writing fp16."""
    stub = StubFormat(runtime, failure)
    monkeypatch.setattr(export.run, "load", lambda package, name: stub)
    monkeypatch.setattr(export.run, "open_runtime", stub.open)


CONFIG = ExportConfig(targets=["onnx:fp32"], probes=2, threads=1)


def test_an_artifact_is_complete_and_proven(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, TorchRuntime)
    said: list[str] = []
    (folder,) = run(CONFIG, random_checkpoint, tmp_path, lambda _, text: said.append(text)).finished()
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
        run(CONFIG, random_checkpoint, tmp_path).finished()
    assert not (tmp_path / "onnx-fp32").exists()


@pytest.mark.parametrize("failure", [CheckFailed("it is another model"), UserError("the disk is full")])
def test_one_target_that_fails_leaves_the_others_and_nothing_half_written(
    failure: Exception,
    random_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(monkeypatch, TorchRuntime, failure)
    config = CONFIG.model_copy(update={"targets": ["onnx:fp16", "onnx:fp32"]})
    outcome = run(config, random_checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["onnx-fp32"] and outcome.artifacts == list(tmp_path.iterdir())
    show(outcome, as_json=True)
    tree = json.loads(capsys.readouterr().out)
    assert tree["failed"] == [{"name": "onnx-fp16", "message": str(failure)}] and len(tree["artifacts"]) == 1
    with pytest.raises(type(failure), match=f"(?s)1 of 2 targets failed.*{failure}"):
        outcome.finished()


def test_a_target_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="target 'onnx:int4': onnx-int4 is asked for twice"):
        ExportConfig(targets=["onnx:int4", "onnx:fp32", "onnx:int4"])


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
        ("onnx:int44", "precision 'int44' is unknown. Did you mean 'int4'.*fp32"),
        ("onnx", "no precision was given.*int4"),
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


def test_a_context_too_short_for_the_probes_stops_before_any_work(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"context_length=40: .* take \d+ tokens"):
        run(CONFIG.model_copy(update={"context_length": 40}), random_checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_stop_before_any_work(random_checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(random_checkpoint, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    next(weight for name, weight in weights.items() if name.endswith("down_proj.weight"))[0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"broken: not all logits are finite"):
        run(CONFIG, broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
