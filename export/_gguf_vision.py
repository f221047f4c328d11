"""The vision tower that feeds llama.cpp's decoder: an ONNX graph, float32 arithmetic on weights stored as float16."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from export.graph import VisionEncoder
from export.source import names_in
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes.llamacpp import FEATURES, PIXELS, TOKENS

OPSET = 21
_TRANSPOSED = ".T"  # ends the name of a matrix that the graph holds as [in, out]


def write_vision(checkpoint: Checkpoint, encoder: VisionEncoder, path: Path) -> None:
    """Write pixel_values [1, 3, S, S] -> image_features [1, V, D], patch_features [1, P, vision_dim].

    Args:
        checkpoint: names the weights and knows the size of the picture, S.
        encoder: its vision tower and projector, float32.
        path: gets the graph.
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
    _store_as_half(model.graph, _names_by_value(checkpoint, encoder))
    onnx.save(model, path)


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
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        values = numpy_helper.to_array(tensor)
        name = names.get(_digest(values), f"constant_{index}")
        casts.append(helper.make_node("Cast", [f"{name}/f16"], [tensor.name], to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}/f16"))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for node in graph.node:
        del node.metadata_props[:]  # where in this machine's source files the exporter found it


def read_vision(checkpoint: Checkpoint, path: Path) -> dict[str, torch.Tensor]:
    """Read the matrices of vision tower and projector back as float32, under the checkpoint's names."""
    shapes = {name: parameter.shape for name, parameter in checkpoint.model.named_parameters()}
    weights = {}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16 and not tensor.name.startswith("constant_"):
            name = tensor.name.removesuffix("/f16")
            values = torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float32))
            values = values.T.contiguous() if name.endswith(_TRANSPOSED) else values
            name = name.removesuffix(_TRANSPOSED)
            weights[name] = values.reshape(shapes[name])
    return weights
