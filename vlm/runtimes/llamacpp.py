"""llama.cpp: its decoder on a .gguf, fed with embeddings; the vision tower runs in ONNX Runtime.

llama.cpp's own CLIP graph is wrong for LLaVA towers (it appends the class token last, issue 25814), so the vision
tokens come from elsewhere and enter through `llama_batch.embd`. Text enters the same way, looked up in the .gguf's own
table, so that one prompt is one batch.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from vlm.errors import UserError
from vlm.manifest import read_manifest
from vlm.runtimes._onnx_session import open_session
from vlm.runtimes.base import Runtime, VisionOutput

DECODER = "decoder.gguf"
VISION = "vision_encoder.onnx"
PIXELS, TOKENS, FEATURES = "pixel_values", "image_features", "patch_features"  # the vision graph's names


@llama_cpp.llama_log_callback
def _drop(level: int, text: bytes, user_data: object) -> None:
    """Take a line of llama.cpp's log and do nothing with it."""


def silence() -> None:
    """Turn llama.cpp's log off; what goes wrong is known from its return values."""
    llama_cpp.llama_log_set(_drop, ctypes.c_void_p(0))


class LlamaCppRuntime(Runtime):
    """A .gguf decoder in one llama.cpp context and the vision tower in one ONNX session."""

    engine = "llamacpp"

    def __init__(self, folder: Path, threads: int) -> None:
        manifest = read_manifest(folder)
        self.folder, self.facts = folder, manifest.facts(folder)
        decoder = folder / DECODER
        silence()
        llama_cpp.llama_backend_init()
        self._model = _load_model(decoder)
        self._context = _new_context(self._model, self.facts.context_length, threads)
        table = next(tensor for tensor in GGUFReader(decoder).tensors if tensor.name == "token_embd.weight")
        self._rows, self._row_type = table.data, table.tensor_type  # [vocabulary, bytes or values of a row]
        self._batch = _Batch(self.facts.context_length, manifest.hidden_size)
        self._vocabulary = manifest.vocab_size
        self._vision = open_session(folder / VISION, threads, spins=False)
        self.reset()

    def encode_image(self, pixels: np.ndarray) -> VisionOutput:
        """Run vision tower and projector."""
        tokens, features = self._vision.run([TOKENS, FEATURES], {PIXELS: pixels})
        return VisionOutput(features[0], tokens[0])

    def embed(self, ids: list[int]) -> np.ndarray:
        """Dequantize the rows of the embedding table."""
        return np.asarray(dequantize(self._rows[ids], self._row_type), dtype=np.float32)  # [N, D]

    def reset(self) -> None:
        """Empty the KV cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        self._position = 0

    def forward(self, embeds: np.ndarray) -> np.ndarray:
        """Decode one batch of embeddings."""
        batch = self._batch.fill(embeds, self._position)
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            end, room = self._position + len(embeds), self.facts.context_length
            raise UserError(f"{self.folder}: llama.cpp refused {end} positions of {room} (code {code}). Shorten it.")
        self._position += len(embeds)
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._vocabulary,)).copy()  # [vocabulary]

    def close(self) -> None:
        """Free the batch, the context and the model."""
        self._batch.free()
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


class _Batch:
    """A llama_batch of embeddings for one sequence, filled in place through NumPy views of its buffers."""

    def __init__(self, room: int, width: int) -> None:
        self.batch = llama_cpp.llama_batch_init(room, width, 1)
        self.embeds = np.ctypeslib.as_array(self.batch.embd, (room, width))
        self.positions = np.ctypeslib.as_array(self.batch.pos, (room,))
        self.wanted = np.ctypeslib.as_array(self.batch.logits, (room,))
        np.ctypeslib.as_array(self.batch.n_seq_id, (room,))[:] = 1
        for row in range(room):
            self.batch.seq_id[row][0] = 0

    def fill(self, embeds: np.ndarray, start: int) -> llama_cpp.llama_batch:
        """Put embeddings [N, D] at positions start ...; only the last one's logits are computed."""
        count = len(embeds)
        if count > len(self.embeds):
            raise UserError(f"{count} positions at once, the context holds {len(self.embeds)}. Shorten the prompt.")
        self.embeds[:count] = embeds
        self.positions[:count] = np.arange(start, start + count)
        self.wanted[:count] = 0
        self.wanted[count - 1] = 1
        self.batch.n_tokens = count
        return self.batch

    def free(self) -> None:
        """Give the buffers back."""
        llama_cpp.llama_batch_free(self.batch)


def _load_model(path: Path) -> object:
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise UserError(f"{path}: llama.cpp cannot load it. Export the artifact again.")
    return model


def _new_context(model: object, context_length: int, threads: int) -> object:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context_length
    parameters.n_threads = parameters.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise UserError(f"llama.cpp cannot hold a context of {context_length} tokens: not enough memory.")
    return context


def open(folder: Path, threads: int = 2) -> LlamaCppRuntime:
    """Open a GGUF artifact."""
    return LlamaCppRuntime(folder, threads)
