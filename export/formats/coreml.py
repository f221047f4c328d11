"""Core ML (iOS 18): three ML programs, float16 or with quantized weights; the decoder keeps its KV cache in states.

vision_encoder.mlpackage   pixel_values -> image_features, patch_features
embed_tokens.mlpackage     input_ids -> inputs_embeds
decoder.mlpackage          inputs_embeds, causal_mask, states key_cache and value_cache -> logits
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export._coreml_modules import CoreMlDecoder
from export.formats.base import Written
from export.graph import TokenEmbedding, VisionEncoder
from vlm.errors import CheckFailed
from vlm.manifest import Precision
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes._mil import block_of, constants, coremltools, read_spec
from vlm.runtimes.coreml import DECODER, EMBEDDING, VISION

ct = coremltools()
ENGINE = "coreml"
PRECISIONS = ("fp16", "int4")
BLOCK = 32  # weights that share a scale in int4
_NOTE = (
    "On Linux the saved programs are interpreted in NumPy at float32: this proves the graphs and the weights in the "
    "files, not Apple's runtime, its float16 arithmetic or its speed."
)


def write(checkpoint: Checkpoint, precision: str, folder: Path, context_length: int) -> Written:
    """Write the three programs into `folder`.

    Args:
        checkpoint: the model, float32.
        precision: "fp16", or "int4" (decoder and embedding in blocks of 32; the vision tower and projector stay fp16).
        context_length: longest sequence in tokens.
    Raises:
        CheckFailed: the saved decoder never writes its states, so its KV cache would stay empty.
    """
    notes = [_NOTE]
    with _quiet():
        models = {
            VISION: _convert_vision(checkpoint),
            EMBEDDING: _convert_embedding(checkpoint, context_length),
            DECODER: _convert_decoder(checkpoint, context_length),
        }
        for file, model in models.items():
            quantized = model if precision == "fp16" or file == VISION else _quantize(model, file)
            quantized.save(str(folder / file))
    layers = int(checkpoint.model.config.text_config.num_hidden_layers)
    check_states(folder / DECODER, layers)
    if precision == "int4":
        notes += _left_out(folder)
    return Written(
        precisions=Precision(vision="fp16", projector="fp16", embedding=precision, decoder=precision),
        settings={"layers": layers},
        notes=notes,
    )


def dequantized(checkpoint: Checkpoint, precision: str, folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights back from the saved programs as float32, under the checkpoint's names."""
    modules: dict[str, nn.Module] = {
        VISION: VisionEncoder(checkpoint.model),
        EMBEDDING: TokenEmbedding(checkpoint.model),
        DECODER: CoreMlDecoder(checkpoint.model, 1),
    }
    theirs = {parameter.data_ptr(): name for name, parameter in checkpoint.model.named_parameters()}
    weights = {}
    for file, module in modules.items():
        parameters = {re.sub(r"\W", "_", name): parameter for name, parameter in module.named_parameters()}
        for name, values in constants(folder / file):
            parameter = parameters.get(re.sub(r"_to_fp16(_quantized)?$", "", name))
            if parameter is not None and parameter.numel() == values.size:
                weights[theirs[parameter.data_ptr()]] = torch.from_numpy(values).reshape(parameter.shape)
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


def _convert_vision(checkpoint: Checkpoint) -> Any:
    size = checkpoint.facts.preprocessing.size
    pixels = torch.zeros(1, 3, size, size)
    return _convert(
        VisionEncoder(checkpoint.model),
        (pixels,),
        inputs=[ct.TensorType("pixel_values", pixels.shape)],
        outputs=[ct.TensorType("image_features"), ct.TensorType("patch_features")],
    )


def _convert_embedding(checkpoint: Checkpoint, context_length: int) -> Any:
    tokens = ct.RangeDim(1, context_length, default=4)
    return _convert(
        TokenEmbedding(checkpoint.model),
        (torch.zeros(1, 4, dtype=torch.int32),),
        inputs=[ct.TensorType("input_ids", (1, tokens), dtype=np.int32)],
        outputs=[ct.TensorType("inputs_embeds", dtype=np.float16)],
    )


def _convert_decoder(checkpoint: Checkpoint, context_length: int) -> Any:
    decoder = CoreMlDecoder(checkpoint.model, context_length)
    width = int(checkpoint.model.config.text_config.hidden_size)
    new, end = ct.RangeDim(1, context_length, default=4), ct.RangeDim(1, context_length, default=8)
    cache = ct.TensorType(shape=tuple(decoder.get_buffer("key_cache").shape), dtype=np.float16)
    return _convert(
        decoder,
        (torch.zeros(1, 4, width), torch.zeros(1, 1, 4, 8)),
        inputs=[
            ct.TensorType("inputs_embeds", (1, new, width), dtype=np.float16),
            ct.TensorType("causal_mask", (1, 1, new, end), dtype=np.float16),
        ],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        states=[ct.StateType(wrapped_type=cache, name=name) for name in ("key_cache", "value_cache")],
    )


def _convert(module: nn.Module, example: tuple[torch.Tensor, ...], **interface: Any) -> Any:
    with torch.no_grad():
        traced = torch.jit.trace(module.eval(), example, strict=False, check_trace=False)
    return ct.convert(traced, minimum_deployment_target=ct.target.iOS18, skip_model_load=True, **interface)


def _quantize(model: Any, file: str) -> Any:
    """Quantize what `linear` and `gather` multiply with or read; rotary tables and biases are none of these."""
    optimize = ct.optimize.coreml
    in_blocks = optimize.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=BLOCK, weight_threshold=0
    )
    kinds = {EMBEDDING: {"gather": in_blocks}, DECODER: {"linear": in_blocks}}
    return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(op_type_configs=kinds[file]))


def _left_out(folder: Path) -> list[str]:
    """Name the matrices that kept float16 because their rows do not divide into blocks."""
    plain = [
        name.removesuffix("_to_fp16")
        for file in (EMBEDDING, DECODER)
        for name, values in constants(folder / file)
        if name.endswith("_weight_to_fp16") and values.ndim > 1
    ]
    return [f"These kept float16, their rows are no multiple of {BLOCK}: {', '.join(sorted(plain))}."] if plain else []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide coremltools' progress bars and warnings; what goes wrong is raised."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
