"""Core ML: Apple's runtime on macOS; elsewhere the programs are interpreted in NumPy: right answers, no speed."""

import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from vlm.errors import UserError
from vlm.manifest import read_manifest
from vlm.runtimes._mil import Program, coremltools
from vlm.runtimes.base import Runtime, VisionOutput

VISION = "vision_encoder.mlpackage"
EMBEDDING = "embed_tokens.mlpackage"
DECODER = "decoder.mlpackage"
_MASKED = -1e4  # far below any score, and float16 holds it


class _Program(Protocol):
    """What Apple's runtime and the interpreter have in common here."""

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]: ...

    def reset(self) -> None: ...


class CoreMlRuntime(Runtime):
    """Three programs; the decoder's states are the KV cache."""

    engine = "coreml"
    emulated = sys.platform != "darwin"

    def __init__(self, folder: Path, threads: int) -> None:
        manifest = read_manifest(folder)
        self.folder, self.facts = folder, manifest.facts(folder)
        if self.emulated:
            # The interpreted matrices are small: waiting for a second BLAS thread costs more than it computes.
            threadpool_limits(1, user_api="blas")
        self._vision, self._embedding, self._decoder = (_open(folder / f) for f in (VISION, EMBEDDING, DECODER))
        self.reset()

    def encode_image(self, pixels: np.ndarray) -> VisionOutput:
        """Run vision tower and projector."""
        out = self._vision(pixel_values=pixels)
        return VisionOutput(out["patch_features"][0], out["image_features"][0])

    def embed(self, ids: list[int]) -> np.ndarray:
        """Look up token embeddings."""
        return np.asarray(self._embedding(input_ids=np.array([ids], np.int32))["inputs_embeds"][0], np.float32)

    def reset(self) -> None:
        """Start with empty states."""
        self._decoder.reset()
        self._position = 0

    def forward(self, embeds: np.ndarray) -> np.ndarray:
        """Append embeddings and return the last logits."""
        new, end = len(embeds), self._position + len(embeds)
        if end > self.facts.context_length:
            raise UserError(f"{self.folder}: {end} positions found, the context holds {self.facts.context_length}.")
        mask = np.triu(np.full((new, end), _MASKED, np.float32), 1 + self._position)  # [N, E]
        logits = self._decoder(inputs_embeds=embeds[None], causal_mask=mask[None, None])["logits"]
        self._position = end
        return np.asarray(logits[0, 0], np.float32)  # [vocabulary]


class _AppleProgram:
    """A program in Apple's runtime. The tests show it a stand-in for that: they run where macOS is not."""

    def __init__(self, package: Path) -> None:
        self._model: Any = coremltools().models.MLModel(str(package))
        self._stateful = bool(self._model.get_spec().description.state)  # once: reading the description is slow
        self.reset()

    def reset(self) -> None:
        self._state = self._model.make_state() if self._stateful else None

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return dict(self._model.predict(inputs, state=self._state))


def _open(package: Path) -> _Program:
    return Program(package) if CoreMlRuntime.emulated else _AppleProgram(package)


def open(folder: Path, threads: int = 2) -> CoreMlRuntime:
    """Open a Core ML artifact."""
    return CoreMlRuntime(folder, threads)
