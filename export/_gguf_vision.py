"""The vision tower that feeds llama.cpp's decoder: an ONNX graph, float32 arithmetic on weights in float16 or q8_0."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from onnx import TensorProto, helper, numpy_helper

from export._onnx_weights import name_matrices, read_stored, store
from export.blocks import Blocks, Rounding
from export.graph import VisionEncoder
from export.rounding import component
from export.source import names_in
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes.llamacpp import FEATURES, PIXELS, TOKENS

OPSET = 21
_TRANSPOSED, _HALF = ".T", "/f16"  # end the names of a matrix that the graph holds as [in, out], and of a stored one
Q8_0 = GGMLQuantizationType.Q8_0
BLOCK, ZERO = 32, 128  # of q8_0: weights that share a scale; of the codes as ONNX Runtime has them, which are unsigned


def eight_bit(checkpoint: Checkpoint, stored: dict[str, str]) -> tuple[list[str], list[str]]:
    """Names of the linear layers' matrices that are to be q8_0: those that can, and those with broken blocks.

    Args:
        checkpoint: the model.
        stored: component -> storage.
    """
    encoder, rounded, ragged = VisionEncoder(checkpoint.model), list[str](), list[str]()
    names = names_in(checkpoint, encoder)
    for path, layer in encoder.named_modules():
        if isinstance(layer, torch.nn.Linear) and stored[component(name := names[f"{path}.weight"])] == "q8_0":
            (ragged if layer.in_features % BLOCK else rounded).append(name)
    return rounded, ragged


def q8_0(matrix: np.ndarray) -> np.ndarray:
    """Round a float32 matrix [out, in] as llama.cpp does: per block of 32 a float16 scale, then the integers, uint8."""
    return quantize(matrix, Q8_0)


def write_vision(checkpoint: Checkpoint, encoder: VisionEncoder, path: Path, rounded: list[str]) -> None:
    """Write pixel_values [1, 3, S, S] -> image_features [1, V, D], patch_features [1, P, vision_dim].

    Args:
        checkpoint: names the weights and knows the size of the picture, S.
        encoder: its vision tower and projector, float32.
        path: gets the graph.
        rounded: `eight_bit`: these hold what mmproj.gguf holds, the others are float16.
    """
    size = checkpoint.facts.preprocessing.size
    pixels = torch.zeros(1, 3, size, size)
    program: Any = torch.onnx.export(
        encoder,
        (pixels,),
        dynamo=True,
        input_names=[PIXELS],
        output_names=[TOKENS, FEATURES],
        opset_version=OPSET,
        verbose=False,
    )
    model = program.model_proto
    if rounded:
        layers = {id(part): name for name, part in checkpoint.model.named_modules()}
        pairs = zip(VisionEncoder(checkpoint.model).modules(), encoder.modules(), strict=True)
        name_matrices(model, {layers[id(shared)]: ours for shared, ours in pairs if id(shared) in layers})
        store(model, lambda name: "int8-sym" if name in rounded else "fp32", 0, _blocks)
    _store_as_half(model.graph, _names_by_value(checkpoint, encoder))
    onnx.save(model, path)


def _blocks(matrix: np.ndarray, rounding: Rounding) -> Blocks:
    packed = q8_0(matrix).reshape(len(matrix), -1, BLOCK + 2)  # [out, blocks, bytes of a block]
    scales = packed[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)  # [out, blocks]
    codes = (packed[..., 2:].view(np.int8).astype(np.int16) + ZERO).astype(np.uint8)  # [out, blocks, 32]
    return Blocks(codes.reshape(len(matrix), -1), scales, np.full(scales.shape, ZERO, np.uint8))


def _names_by_value(checkpoint: Checkpoint, encoder: VisionEncoder) -> dict[bytes, str]:
    """The exporter folds transposes and so forgets names; the values tell which parameter a tensor was."""
    names = {}
    theirs = names_in(checkpoint, VisionEncoder(checkpoint.model))
    for ours, parameter in encoder.named_parameters():
        name, values = theirs[ours], parameter.detach()
        names[_digest(values.numpy())] = name
        if values.ndim == 2:
            names.setdefault(_digest(values.T.numpy()), name + _TRANSPOSED)
    return names


def _digest(values: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(values).data).digest()


def _store_as_half(graph: Any, names: dict[bytes, str]) -> None:
    """Replace each float32 matrix by a float16 one and a Cast, which ONNX Runtime folds away at load."""
    casts = []
    for index, tensor in enumerate(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2 or tensor.name.endswith(".scales"):
            continue
        values = numpy_helper.to_array(tensor)
        name = names.get(_digest(values), f"constant_{index}")
        casts.append(helper.make_node("Cast", [f"{name}{_HALF}"], [tensor.name], to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}{_HALF}"))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for node in graph.node:
        del node.metadata_props[:]  # where in this machine's source files the exporter found it


def read_vision(checkpoint: Checkpoint, path: Path) -> dict[str, torch.Tensor]:
    """Read the matrices of vision tower and projector back as float32, under the checkpoint's names."""
    shapes = {name: parameter.shape for name, parameter in checkpoint.model.named_parameters()}
    model = onnx.load(path)
    found = read_stored(model).items()
    weights = {name: torch.from_numpy(matrix) for name, matrix in found if not name.endswith(_HALF)}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16 and not tensor.name.startswith("constant_"):
            name = tensor.name.removesuffix(_HALF)
            values = torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float32))
            values = values.T.contiguous() if name.endswith(_TRANSPOSED) else values
            name = name.removesuffix(_TRANSPOSED)
            weights[name] = values.reshape(shapes[name])
    return weights
