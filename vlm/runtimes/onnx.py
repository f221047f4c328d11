"""ONNX Runtime on the CPU: three sessions, keys and values handed from step to step."""

from pathlib import Path

import numpy as np

from vlm.manifest import read_manifest
from vlm.runtimes._onnx_session import open_session
from vlm.runtimes.base import Runtime, VisionOutput

VISION = "vision_encoder.onnx"
EMBEDDING = "embed_tokens.onnx"
DECODER = "decoder_model_merged.onnx"


def cache_names(layers: int) -> tuple[list[str], list[str]]:
    """Names of the decoder's past inputs and present outputs, key and value of each layer in turn."""
    past = [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    return past, [name.replace("past_key_values", "present") for name in past]


class OnnxRuntime(Runtime):
    """Runs an ONNX artifact from its folder alone."""

    engine = "onnx"

    def __init__(self, folder: Path, threads: int) -> None:
        manifest = read_manifest(folder)
        self.folder, self.facts = folder, manifest.facts(folder)
        self._vision, self._embedding, self._decoder = (
            open_session(folder / file, threads) for file in (VISION, EMBEDDING, DECODER)
        )
        settings = manifest.settings
        self._past, self._present = cache_names(int(settings["layers"]))
        shape = (1, int(settings["kv_heads"]), 0, int(settings["head_dim"]))
        self._empty = np.zeros(shape, np.float32)  # [1, KV, 0, d]
        self.reset()

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
        self._length = 0
        self._cache: list[np.ndarray] = [self._empty] * len(self._past)

    def forward(self, embeds: np.ndarray) -> np.ndarray:
        """Append embeddings and return the last logits."""
        inputs = dict(zip(self._past, self._cache, strict=True))
        inputs["inputs_embeds"] = np.ascontiguousarray(embeds[None], np.float32)  # [1, N, D]
        inputs["position_ids"] = np.arange(self._length, self._length + len(embeds), dtype=np.int64)[None]  # [1, N]
        logits, *self._cache = self._decoder.run(["logits", *self._present], inputs)
        self._length += len(embeds)
        return np.asarray(logits[0, 0])  # [vocabulary]


def open(folder: Path, threads: int = 2) -> OnnxRuntime:
    """Open the artifact in `folder`."""
    return OnnxRuntime(folder, threads)
