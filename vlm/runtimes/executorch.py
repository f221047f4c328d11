"""ExecuTorch: one multi-method model.pte run by android_harness's C++ through ctypes; torch is never loaded."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UserError
from vlm.manifest import Facts, read_manifest
from vlm.runtimes._executorch_library import LIBRARY, build
from vlm.runtimes.base import Runtime, VisionOutput

MODEL = "model.pte"
_ERROR_BYTES = 1024
_FLOATS = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
_IDS = np.ctypeslib.ndpointer(np.int64, flags="C_CONTIGUOUS")


class _Sizes(ctypes.Structure):
    """`pocketvlm::Sizes` of android_harness/src/model.h."""

    _fields_ = (
        ("pixels", ctypes.c_int64),
        ("vision_tokens", ctypes.c_int64),
        ("patches", ctypes.c_int64),
        ("vision_width", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("context", ctypes.c_int64),
    )


def _load_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build() / LIBRARY))
    model, error = ctypes.c_void_p, ctypes.c_char_p
    out_model, out_sizes = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(_Sizes)
    library.pocketvlm_open.argtypes = [ctypes.c_char_p, ctypes.c_int, out_model, out_sizes, error]
    library.pocketvlm_encode_image.argtypes = [model, _FLOATS, _FLOATS, _FLOATS, error]
    library.pocketvlm_embed.argtypes = [model, _IDS, ctypes.c_int64, _FLOATS, error]
    library.pocketvlm_forward.argtypes = [model, _FLOATS, ctypes.c_int64, _FLOATS, error]
    for name in ("close", "reset"):
        function = getattr(library, f"pocketvlm_{name}")
        function.argtypes, function.restype = [model], None
    return library


class ExecutorchRuntime(Runtime):
    """A loaded model.pte; `threads` sizes ExecuTorch's thread pool, of which a process has one."""

    engine = "executorch"

    def __init__(self, folder: Path, facts: Facts, threads: int) -> None:
        self.folder, self.facts = folder, facts
        self._library = _load_library()
        self._error = ctypes.create_string_buffer(_ERROR_BYTES)
        self._model: ctypes.c_void_p | None = ctypes.c_void_p()
        self._sizes = _Sizes()
        path = str(folder / MODEL).encode()
        self._call("open", path, threads, ctypes.byref(self._model), ctypes.byref(self._sizes))

    def encode_image(self, pixels: np.ndarray) -> VisionOutput:
        """Run vision tower and projector."""
        sizes = self._sizes
        if pixels.size != sizes.pixels:
            raise UserError(
                f"{self.folder / MODEL}: {pixels.size} pixel values found, {sizes.pixels} expected: "
                f"the manifest's preprocessing is not the program's. Export the artifact again."
            )
        tokens = np.empty((sizes.vision_tokens, sizes.hidden), np.float32)  # [V, D]
        features = np.empty((sizes.patches, sizes.vision_width), np.float32)  # [P, vision_dim]
        self._call("encode_image", self._model, np.ascontiguousarray(pixels, np.float32), tokens, features)
        return VisionOutput(features if sizes.patches else None, tokens)

    def embed(self, ids: list[int]) -> np.ndarray:
        """Look up token embeddings."""
        embeds = np.empty((len(ids), self._sizes.hidden), np.float32)  # [N, D]
        self._call("embed", self._model, np.array(ids, np.int64), len(ids), embeds)
        return embeds

    def reset(self) -> None:
        """Empty the KV cache."""
        self._library.pocketvlm_reset(self._model)

    def forward(self, embeds: np.ndarray) -> np.ndarray:
        """Append embeddings and return the last logits."""
        if embeds.ndim != 2 or embeds.shape[1] != self._sizes.hidden:
            raise UserError(
                f"{self.folder / MODEL}: embeds {embeds.shape} found, [N, {self._sizes.hidden}] expected. "
                "Embed with this artifact's own `embed`."
            )
        logits = np.empty(self._sizes.vocabulary, np.float32)  # [vocabulary]
        self._call("forward", self._model, np.ascontiguousarray(embeds, np.float32), len(embeds), logits)
        return logits

    def close(self) -> None:
        """Free the model's memory."""
        if self._model is not None:
            self._library.pocketvlm_close(self._model)
            self._model = None

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, f"pocketvlm_{name}")(*arguments, self._error) != 0:
            path = self.folder / MODEL
            found = self._error.value.decode(errors="replace").removeprefix(f"{path}: ")
            step = "Shorten the prompt if it is too long, else e" if name == "forward" else "E"
            raise UserError(f"{path}: {found}. {step}xport the artifact again.")


def prepare() -> None:
    """Compile the engine if this machine has not done so yet (seconds)."""
    build()


def open(folder: Path, threads: int = 2) -> ExecutorchRuntime:
    """Open the artifact in `folder`; the first call on a machine compiles the engine (android_harness, seconds).

    Raises:
        UserError: no valid artifact, no ExecuTorch wheel with a C++ runtime, no compiler, or an unreadable program.
    """
    manifest = read_manifest(folder)
    return ExecutorchRuntime(folder, manifest.facts(folder), threads)
