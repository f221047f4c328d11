"""ONNX Runtime on the CPU: three sessions; keys and values grow in place, or from step to step."""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from vlm.errors import UserError
from vlm.manifest import Manifest, read_manifest
from vlm.runtimes._onnx_session import open_session
from vlm.runtimes.base import Runtime, VisionOutput

VISION = "vision_encoder.onnx"
EMBEDDING = "embed_tokens.onnx"
DECODER = "decoder_model_merged.onnx"


def cache_names(layers: int) -> tuple[list[str], list[str]]:
    """Names of the decoder's past inputs and present outputs, key and value of each layer in turn."""
    past = [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    return past, [name.replace("past_key_values", "present") for name in past]


class GrowingCache:
    """Keys and values that the decoder returns longer at every step; they are copied each time.

    Args:
        session: a decoder that asks for positions.
        manifest: its sizes.
    """

    def __init__(self, session: ort.InferenceSession, manifest: Manifest) -> None:
        self._session = session
        self._past, self._present = cache_names(int(manifest.settings["layers"]))
        self._empty = _zeros(manifest, 0)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._length = 0
        self._cache: list[np.ndarray] = [self._empty] * len(self._past)

    def step(self, embeds: np.ndarray) -> np.ndarray:
        """Append embeds [1, N, D] and return logits [1, 1, vocabulary]."""
        start, self._length = self._length, self._length + embeds.shape[1]
        inputs = dict(zip(self._past, self._cache, strict=True))
        inputs |= {"inputs_embeds": embeds, "position_ids": np.arange(start, self._length, dtype=np.int64)[None]}
        logits, *self._cache = self._session.run(["logits", *self._present], inputs)
        return np.asarray(logits)


class SharedCache:
    """Keys and values in buffers of the whole context that the decoder appends to in place: past is present.

    Args:
        session: a decoder that asks for the mask (GroupQueryAttention).
        manifest: its sizes.
    """

    def __init__(self, session: ort.InferenceSession, manifest: Manifest) -> None:
        self._session, self._context = session, manifest.context_length
        self._binding = session.io_binding()
        self._mask = np.ones((1, self._context), np.int64)
        for past, present in zip(*cache_names(int(manifest.settings["layers"])), strict=True):
            buffer = ort.OrtValue.ortvalue_from_numpy(_zeros(manifest, self._context))  # [1, KV, S, d]
            self._binding.bind_ortvalue_input(past, buffer)
            self._binding.bind_ortvalue_output(present, buffer)
        self.reset()

    def reset(self) -> None:
        """Forget everything; what is behind the mask's end is never read."""
        self._length = 0

    def step(self, embeds: np.ndarray) -> np.ndarray:
        """Append embeds [1, N, D] and return logits [1, 1, vocabulary].

        Raises:
            UserError: the context is full; nothing was appended.
        """
        length = self._length + embeds.shape[1]
        if length > self._context:
            raise UserError(
                f"{self._session._model_path}: the sequence would have {length} tokens, the context holds "
                f"{self._context}. Shorten the prompt, or export with a longer --context-length."
            )
        self._binding.bind_cpu_input("inputs_embeds", embeds)
        self._binding.bind_cpu_input("attention_mask", self._mask[:, :length])
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        self._length = length
        return np.asarray(self._binding.get_outputs()[-1].numpy())  # in the order of binding


def _zeros(manifest: Manifest, positions: int) -> np.ndarray:
    settings = manifest.settings
    return np.zeros((1, int(settings["kv_heads"]), positions, int(settings["head_dim"])), np.float32)  # [1, KV, P, d]


class OnnxRuntime(Runtime):
    """Runs an ONNX artifact from its folder alone."""

    engine = "onnx"

    def __init__(self, folder: Path, threads: int) -> None:
        manifest = read_manifest(folder)
        self.folder, self.facts = folder, manifest.facts(folder)
        self._vision = open_session(folder / VISION, threads, spins=False)
        self._embedding = open_session(folder / EMBEDDING, 1)  # a table's rows: nothing to share
        decoder = open_session(folder / DECODER, threads)
        is_shared = "attention_mask" in {value.name for value in decoder.get_inputs()}
        self._cache = SharedCache(decoder, manifest) if is_shared else GrowingCache(decoder, manifest)

    def encode_image(self, pixels: np.ndarray) -> VisionOutput:
        """Run vision tower and projector."""
        tokens, features = self._vision.run(["image_features", "patch_features"], {"pixel_values": pixels})
        return VisionOutput(features[0], tokens[0])

    def embed(self, ids: list[int]) -> np.ndarray:
        """Look up token embeddings."""
        embeds = self._embedding.run(["inputs_embeds"], {"input_ids": np.array([ids], np.int64)})[0]  # [1, N, D]
        return np.asarray(embeds[0])

    def reset(self) -> None:
        """Empty the KV cache."""
        self._cache.reset()

    def forward(self, embeds: np.ndarray) -> np.ndarray:
        """Append embeddings and return the last logits."""
        logits = self._cache.step(np.ascontiguousarray(embeds[None], np.float32))  # [1, 1, vocabulary]
        return np.asarray(logits[0, 0])  # [vocabulary]


def open(folder: Path, threads: int = 2) -> OnnxRuntime:
    """Open the artifact in `folder`."""
    return OnnxRuntime(folder, threads)
