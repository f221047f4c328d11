"""Artifacts of the tiny random model and what the export tests ask of every engine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from export.source import with_weights
from tests.manifests import write_manifest
from vlm.manifest import Manifest
from vlm.models.checkpoint import Checkpoint
from vlm.registry import load
from vlm.runtimes.base import Runtime
from vlm.runtimes.torch import TorchRuntime

CONTEXT = 256
STEPS = 8


def write_artifact(checkpoint: Checkpoint, target: str, folder: Path) -> Manifest:
    """Write "<format>:<precision>" into `folder` with tokenizer and manifest; `Manifest.name` is the folder."""
    form, _, precision = target.partition(":")
    module = load("export.formats", form)
    written = module.write(checkpoint, precision, folder, CONTEXT)
    (folder / "tokenizer.json").write_bytes(checkpoint.facts.tokenizer.read_bytes())
    text: Any = checkpoint.model.config.text_config
    return write_manifest(
        folder,
        name=str(folder),
        format=form,
        engine=module.ENGINE,
        precision=precision,
        precisions=written.precisions,
        **replace(checkpoint.facts, context_length=CONTEXT).record(),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        settings=written.settings,
        notes=written.notes,
    )


def reference(checkpoint: Checkpoint, manifest: Manifest) -> TorchRuntime:
    """The checkpoint with the weights that the artifact's files hold."""
    module = load("export.formats", manifest.format)
    return TorchRuntime(
        with_weights(checkpoint, module.dequantized(checkpoint, manifest.precision, Path(manifest.name)))
    )


def cosine(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """Worst cosine of the rows of a and b [N, D]."""
    assert a is not None and b is not None and a.shape == b.shape
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())


def pixels() -> np.ndarray:
    """Noise, in which every patch differs: [1, 3, 96, 96]."""
    return np.random.default_rng(0).standard_normal((1, 3, 96, 96)).astype(np.float32)


def teacher_forced(runtime: Runtime, ids: list[int], answer: list[int]) -> np.ndarray:
    """Logits of the prompt's last position and of each answer token, [1 + N, vocabulary]."""
    runtime.reset()
    logits = [runtime.forward(runtime.prompt_embeds(ids, runtime.encode_image(pixels())))]
    return np.stack(logits + [runtime.forward(runtime.embed([token])) for token in answer])


def greedy(runtime: Runtime, ids: list[int]) -> list[int]:
    """The first STEPS tokens of the answer, whatever they are."""
    runtime.reset()
    tokens = [int(runtime.forward(runtime.prompt_embeds(ids, runtime.encode_image(pixels()))).argmax())]
    while len(tokens) < STEPS:
        tokens.append(int(runtime.forward(runtime.embed(tokens[-1:])).argmax()))
    return tokens
