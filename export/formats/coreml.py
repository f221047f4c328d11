"""Core ML (iOS 18): three ML programs, float16 or with quantized weights; the decoder keeps its KV cache in states.

vision_encoder.mlpackage   pixel_values -> image_features, patch_features
embed_tokens.mlpackage     input_ids -> inputs_embeds
decoder.mlpackage          inputs_embeds, causal_mask, states key_cache and value_cache -> logits
"""

import contextlib
import gc
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export._coreml_modules import CoreMlDecoder
from export._coreml_weights import BLOCK, STORE, in_blocks, matrices, register, skeleton
from export.calibration import LayerInputs
from export.formats.base import Cost, Written
from export.graph import TokenEmbedding, VisionEncoder
from export.precision import COMPONENTS, resolve, uniform
from export.source import names_in
from vlm.errors import CheckFailed
from vlm.manifest import Precision
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes._mil import block_of, constants, coremltools, read_spec
from vlm.runtimes.coreml import DECODER, EMBEDDING, VISION

ct = coremltools()
ENGINE = "coreml"
COST = Cost(memory=3.5, seconds=60e-9, vision=2.0)
# A scale per row in int8, one per 32 columns in int4, a palette of 16 values per 16 rows in pal4.
PRESETS = {
    "fp16": uniform("fp16"),
    "int8": uniform("int8"),
    "int4": uniform("int4", vision="fp16", projector="fp16"),
    "pal4": uniform("pal4", vision="fp16", projector="fp16"),
}
STORAGES = dict.fromkeys(COMPONENTS, tuple(STORE))
PRECISIONS = tuple(PRESETS)
_Interface = tuple[tuple[torch.Tensor, ...], dict[str, Any]]
_NOTE = (
    "On Linux the saved programs are interpreted in NumPy at float32: this proves the graphs and the weights in the "
    "files, not Apple's runtime, its float16 arithmetic or its speed."
)


def write(
    checkpoint: Checkpoint, precision: str, folder: Path, context_length: int, inputs: LayerInputs | None = None
) -> Written:
    """Write the three programs into `folder`.

    Args:
        checkpoint: the model, its weights as they are stored.
        precision: a preset, and exceptions (export.precision). Biases, norms, position embeddings and the patch
            embedding are float16 in all of them.
        context_length: longest sequence in tokens.
        inputs: what the decoder's matrices are multiplied with; see export.formats.base.
    Raises:
        CheckFailed: the saved decoder never writes its states, so its KV cache would stay empty.
    """
    chosen = resolve(precision, PRESETS, STORAGES)
    modules, interfaces = _modules(checkpoint, context_length), _interfaces(checkpoint, context_length)
    with _quiet():
        for file, module in modules.items():
            _convert(checkpoint, module, _storage(file, chosen), inputs, *interfaces[file]()).save(str(folder / file))
            gc.collect()  # a program's weights hang in cycles, and the next one is larger
    layers = int(checkpoint.model.config.text_config.num_hidden_layers)
    check_states(folder / DECODER, layers)
    return Written(
        precisions=Precision(**chosen),
        settings={"layers": layers},
        notes=[_NOTE, *_left_out(modules, chosen)],
    )


def dequantized(checkpoint: Checkpoint, precision: str, folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights back from the saved programs as float32, under the checkpoint's names."""
    weights = {}
    for file, module in _modules(checkpoint, 1).items():
        theirs = names_in(checkpoint, module)
        parameters = {re.sub(r"\W", "_", name): (theirs[name], p.shape) for name, p in module.named_parameters()}
        for constant, values in constants(folder / file):
            name, shape = parameters.get(re.sub(r"_to_fp16(_quantized|_palettized)?$", "", constant), ("", None))
            if shape is not None and shape.numel() == values.size:
                weights[name] = torch.from_numpy(values).reshape(shape)
    return weights


def check_states(package: Path, layers: int) -> None:
    """Make sure that the saved program writes keys and values of every layer.

    Raises:
        CheckFailed: fewer writes than 2 per layer (coremltools drops the writes of an indexed assignment silently).
    """
    kinds = [operation.type for operation in block_of(read_spec(package)).operations]
    found = sum(kind in ("write_state", "coreml_update_state") for kind in kinds)
    if found < 2 * layers:
        raise CheckFailed(
            f"{package}: {found} state writes found, {2 * layers} expected: the KV cache would stay empty."
        )


def _modules(checkpoint: Checkpoint, context_length: int) -> dict[str, nn.Module]:
    return {
        VISION: VisionEncoder(checkpoint.model),
        EMBEDDING: TokenEmbedding(checkpoint.model),
        DECODER: CoreMlDecoder(checkpoint.model, context_length),
    }


def _storage(file: str, chosen: dict[str, str]) -> Callable[[str], str]:
    """A layer's name in a program -> how its matrix is stored."""
    special = {VISION: ("projector_", "projector"), DECODER: ("head", "head"), EMBEDDING: ("table", "embedding")}
    others = {VISION: "vision", DECODER: "decoder", EMBEDDING: "embedding"}
    prefix, component = special[file]
    return lambda name: chosen[component if name.startswith(prefix) else others[file]]


def _left_out(modules: dict[str, nn.Module], chosen: dict[str, str]) -> list[str]:
    """Name the matrices that keep float16 because their rows do not divide into blocks."""
    plain = [
        f"{name}_weight"
        for file, module in modules.items()
        for name, layer in matrices(module)
        if _storage(file, chosen)(name) == "int4" and not in_blocks(layer)
    ]
    return [f"These kept float16, their rows are no multiple of {BLOCK}: {', '.join(sorted(plain))}."] if plain else []


def _interfaces(checkpoint: Checkpoint, context_length: int) -> dict[str, Callable[[], _Interface]]:
    """Each program's example inputs for the tracer, and its inputs, outputs and states as Core ML wants them."""
    text = checkpoint.model.config.text_config
    size, width = checkpoint.facts.preprocessing.size, int(text.hidden_size)
    shape = (int(text.num_hidden_layers), 1, int(text.num_key_value_heads), context_length, int(text.head_dim))

    def vision() -> _Interface:
        pixels = torch.zeros(1, 3, size, size)
        return (pixels,), {
            "inputs": [ct.TensorType("pixel_values", pixels.shape)],
            "outputs": [ct.TensorType("image_features"), ct.TensorType("patch_features")],
        }

    def embedding() -> _Interface:
        tokens = ct.RangeDim(1, context_length, default=4)
        return (torch.zeros(1, 4, dtype=torch.int32),), {
            "inputs": [ct.TensorType("input_ids", (1, tokens), dtype=np.int32)],
            "outputs": [ct.TensorType("inputs_embeds", dtype=np.float16)],
        }

    def decoder() -> _Interface:
        new, end = ct.RangeDim(1, context_length, default=4), ct.RangeDim(1, context_length, default=8)
        cache = ct.TensorType(shape=shape, dtype=np.float16)
        return (torch.zeros(1, 4, width), torch.zeros(1, 1, 4, 8)), {
            "inputs": [
                ct.TensorType("inputs_embeds", (1, new, width), dtype=np.float16),
                ct.TensorType("causal_mask", (1, 1, new, end), dtype=np.float16),
            ],
            "outputs": [ct.TensorType("logits", dtype=np.float16)],
            "states": [ct.StateType(wrapped_type=cache, name=name) for name in ("key_cache", "value_cache")],
        }

    return {VISION: vision, EMBEDDING: embedding, DECODER: decoder}


def _convert(
    checkpoint: Checkpoint,
    module: nn.Module,
    storage: Callable[[str], str],
    inputs: LayerInputs | None,
    example: tuple[torch.Tensor, ...],
    interface: dict[str, Any],
) -> Any:
    bare = skeleton(module)
    register(checkpoint, bare.layers, storage, inputs)
    with torch.no_grad():
        traced = torch.jit.trace(bare.module, example, strict=False, check_trace=False)
    return ct.convert(traced, minimum_deployment_target=ct.target.iOS18, skip_model_load=True, **interface)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide coremltools' progress bars and warnings; what goes wrong is raised."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
