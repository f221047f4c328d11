"""The export stage: checkpoint -> one self-contained, proven artifact folder per target."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from export.calibration import LayerInputs, calibration_embeddings
from export.config import ExportConfig
from export.forecast import Forecast, forecast, parameters, seconds_of
from export.formats.base import Written
from export.outcome import Failure, Outcome
from export.parity import TorchReference, climb
from export.precision import presets, resolve
from export.probes import Probe, scene_probes
from export.questions import questions
from export.rounding import check_rounding
from export.source import open_checkpoint, release_heap, with_weights
from vlm.errors import CheckFailed, UserError, install_hint
from vlm.folders import finished_folder
from vlm.manifest import Manifest, Parity, Precision, artifact_folder, list_files
from vlm.models.checkpoint import Checkpoint
from vlm.registry import load
from vlm.runtimes import open_runtime
from vlm.runtimes.torch import TorchRuntime

Progress = Callable[[float, str], None]
_WRITTEN = 0.4  # of an artifact's time has gone by when it is written and not yet proven
# Libraries whose versions can change an artifact; those that are installed are recorded.
LIBRARIES = (
    "pocketvlm", "torch", "torchao", "transformers", "numpy", "onnx", "onnxscript", "onnxruntime", "executorch",
    "coremltools", "gguf", "llama-cpp-python",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A format's module and one of its precisions."""

    format: str
    precision: str
    module: ModuleType

    @property
    def name(self) -> str:
        """Name of the artifact's folder."""
        return artifact_folder(f"{self.format}:{self.precision}")


@dataclass(frozen=True)
class Source:
    """What all artifacts of a run share: the checkpoint and its traces on the probes."""

    checkpoint: Checkpoint
    reference: TorchReference
    probes: list[Probe]


def run(config: ExportConfig, checkpoint: Path, out: Path, on_progress: Progress | None = None) -> Outcome:
    """Write and prove every target of `config`, whatever becomes of the others.

    Args:
        config: targets and how to prove them.
        checkpoint: folder in Hugging Face layout.
        out: gets one folder "<format>-<precision>" per target.
        on_progress: told the share of all work that is done and a sentence, at each step.
    Returns:
        The artifacts' folders, and the targets that failed: of an artifact that is not the checkpoint's model no folder
        is left, of one that could not be written an older one stays.
    Raises:
        UserError: before anything is written: an unknown target, a damaged checkpoint, a library that is not installed;
            a context too short for the probes; more memory or disk needed than there is, unless config.force.
    """
    targets = [parse_target(text) for text in config.targets]
    opened, say = _open(checkpoint, config), on_progress or _silent
    _needs(config, opened, out).refuse_if_hopeless(config.force)
    for _ in questions(config)(config.calibration_scenes):
        pass  # a record that cannot be used is found now
    parts = [seconds_of(target.format, target.precision, parameters(opened), config) for target in targets]
    ends = [sum(parts[: index + 1]) / sum(parts) for index in range(len(parts))]
    source, outcome = _trace(opened, config), Outcome()
    for target, begin, end in zip(targets, [0.0, *ends], ends, strict=False):
        share = partial(_between, say, begin, end)
        try:
            outcome.artifacts.append(_export(source, target, out, config, share))
        except (CheckFailed, UserError) as error:
            outcome.failures.append(Failure(target.name, str(error), isinstance(error, CheckFailed)))
            share(1.0, f"{target.name}: failed")
        release_heap()
    return outcome


def expected(config: ExportConfig, checkpoint: Path, out: Path) -> Forecast:
    """Say what `run` will need; raises as `run` does."""
    return _needs(config, _open(checkpoint, config), out)


def _needs(config: ExportConfig, checkpoint: Checkpoint, out: Path) -> Forecast:
    targets = [parse_target(text) for text in config.targets]
    return forecast(checkpoint, [(target.format, target.precision) for target in targets], config, out)


def _between(say: Progress, begin: float, end: float, done: float, text: str) -> None:
    """Tell how much of all work is done when a part of it, from `begin` to `end`, is `done`."""
    say(begin + (end - begin) * done, text)


def export_one(
    checkpoint: Path, target: str, out: Path, config: ExportConfig, on_progress: Progress | None = None
) -> Path:
    """Write and prove one target; see `run`.

    Raises:
        CheckFailed: the artifact is not the checkpoint's model.
        UserError: as `run`, and what is found while it is written: the disk is full, an engine is not installed.
    """
    return run(config.model_copy(update={"targets": [target]}), checkpoint, out, on_progress).finished()[0]


def parse_target(text: str) -> Target:
    """Split "<format>:<precision>" and load the format.

    Raises:
        UserError: no such format or precision, or a library it needs is not installed.
    """
    name, _, precision = text.partition(":")
    try:
        module = load("export.formats", name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"target {text!r}: needs {error.name}, which is not installed: {install_hint('export')}."
        ) from error
    try:
        resolve(precision, presets(module), getattr(module, "STORAGES", {}))
    except UserError as error:
        raise UserError(f"target {text!r}: {error}") from error
    return Target(name, precision, module)


def _open(folder: Path, config: ExportConfig) -> Checkpoint:
    torch.set_num_threads(config.threads)
    checkpoint = open_checkpoint(folder)
    longest = _text_config(checkpoint).max_position_embeddings
    if config.context_length > longest:
        raise UserError(f"context_length={config.context_length}: {folder} was made for at most {longest} tokens.")
    return checkpoint


def _trace(checkpoint: Checkpoint, config: ExportConfig) -> Source:
    probes = scene_probes(config.probes)
    runtime = TorchRuntime(with_weights(checkpoint, {}))
    reference = TorchReference(runtime)
    reference.close(probes)
    traces = [reference.trace(probe) for probe in probes]
    if not all(np.isfinite(trace.logits).all() for trace in traces):
        raise UserError(
            f"{checkpoint.folder}: not all logits are finite numbers: damaged weights, or training diverged."
        )
    prompts = [len(runtime.prompt(probe.question)) for probe in probes]
    longest = max(prompt + len(trace.tokens) - 1 for prompt, trace in zip(prompts, traces, strict=True))
    if longest > config.context_length:
        raise UserError(
            f"context_length={config.context_length}: parity's questions and answers take {longest} tokens, "
            "vision tokens among them. Give at least so many with --context-length (export.context_length)."
        )
    return Source(checkpoint, reference, probes)


def _export(source: Source, target: Target, out: Path, config: ExportConfig, say: Progress) -> Path:
    final = out / target.name
    try:
        with finished_folder(final) as folder:
            say(0.0, f"{target.name}: writing")
            manifest = write_artifact(source.checkpoint, target, folder, config)
            if unproven := _unproven(target):
                manifest.model_copy(update={"notes": [*manifest.notes, unproven]}).write(folder)
                say(1.0, f"{target.name}: {unproven}")
                return final
            say(
                _WRITTEN,
                f"{target.name}: {manifest.bytes / 2**20:.1f} MiB; comparing with torch on {len(source.probes)} probes",
            )
            parity = _prove(source, target, folder, config, manifest.precisions)
            manifest.model_copy(update={"parity": parity}).write(folder)
            if not parity.passed and not config.allow_drift:
                raise CheckFailed(_failure(target, parity))
    except (CheckFailed, UserError) as error:
        shutil.rmtree(final.with_name(f"{final.name}.partial"), ignore_errors=True)
        if isinstance(error, CheckFailed):
            # Neither the rejected artifact nor an older one under this name is what the user asked for.
            shutil.rmtree(final, ignore_errors=True)
        raise
    say(1.0, f"{target.name}: done, logits cosine {parity.logits_cos:.6f}")
    return final


def write_artifact(
    checkpoint: Checkpoint, target: Target, folder: Path, config: ExportConfig, inputs: LayerInputs | None = None
) -> Manifest:
    """Write one artifact into an existing folder, without proof; what 4-bit matrices are rounded for is in its notes.

    Args:
        inputs: what the decoder's matrices are multiplied with; None: measured on config's calibration questions.
    """
    scenes = config.calibration_scenes
    if inputs is None and scenes:
        inputs = LayerInputs(checkpoint, partial(calibration_embeddings, checkpoint, scenes, questions(config)))
    with torch.no_grad():
        written = target.module.write(checkpoint, target.precision, folder, config.context_length, inputs)
    release_heap()
    shutil.copyfile(checkpoint.facts.tokenizer, folder / "tokenizer.json")
    manifest = _manifest(checkpoint, target, written, folder, config)
    if inputs is not None and inputs.asked:
        source = f", from {Path(config.calibration_records).name}" if config.calibration_records else ""
        number = inputs.sequences
        note = f"The decoder's 4-bit matrices are rounded by GPTQ for {number} sequences of its inputs{source}."
        manifest = manifest.model_copy(update={"notes": [*manifest.notes, note]})
    manifest.write(folder)
    return manifest


def _unproven(target: Target) -> str | None:
    """Why an artifact cannot be compared on this machine; None where it can."""
    reason: str | None = target.module.unproven(target.precision) if hasattr(target.module, "unproven") else None
    return reason


def _prove(source: Source, target: Target, folder: Path, config: ExportConfig, stored: Precision) -> Parity:
    weights = target.module.dequantized(source.checkpoint, target.precision, folder)
    if weights is not None and not config.allow_drift:
        check_rounding(source.checkpoint, weights, stored, target.name)
    rounded = None if weights is None else TorchReference(TorchRuntime(with_weights(source.checkpoint, weights)))
    if rounded:
        del weights
        rounded.close(source.probes)
    runtime = open_runtime(folder, config.threads)
    try:
        parity = climb(runtime, target.precision, source.reference, rounded, source.probes)
    finally:
        runtime.close()
    return parity.model_copy(update={"allowed_drift": config.allow_drift and not parity.passed})


def _manifest(checkpoint: Checkpoint, target: Target, written: Written, folder: Path, config: ExportConfig) -> Manifest:
    text = _text_config(checkpoint)
    return Manifest(
        schema=1,
        name=target.name,
        format=target.format,
        engine=target.module.ENGINE,
        precision=target.precision,
        precisions=written.precisions,
        files=list_files(folder),
        source_sha256=checkpoint.sha256,
        **replace(checkpoint.facts, context_length=config.context_length).record(),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        versions=_versions(),
        settings=written.settings,
        notes=written.notes,
    )


def _text_config(checkpoint: Checkpoint) -> Any:
    return checkpoint.model.config.text_config


def _versions() -> dict[str, str]:
    installed = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions() if d.name}
    return {name: installed[name] for name in LIBRARIES if name in installed}


def _failure(target: Target, parity: Parity) -> str:
    lines = [
        f"  {rung.name} {rung.metric} {rung.value:.6g}, bar {rung.bar} (against the {rung.reference} weights)"
        for rung in parity.rungs
        if not rung.passed
    ]
    return (
        f"{target.name} is not the model that was trained, worst of {parity.probes} probes:\n"
        + "\n".join(lines)
        + "\nNo artifact was left. To keep it all the same, and have the report say so: --allow-drift."
    )


def _silent(done: float, message: str) -> None:
    """Show nothing."""
