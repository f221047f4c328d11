"""Weight matrices inside an ONNX graph: their names in the checkpoint, block quantization, and the way back.

Both quantized operators of ONNX Runtime hold a matrix [rows, columns] row by row: MatMulNBits a linear layer's
[out, in], GatherBlockQuantized a table [vocabulary, D]. Each run of BLOCK columns has a scale and a zero point:
w = (q - zero_point) * scale (onnxruntime/docs/ContribOperators.md).
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx.helper import get_node_attr_value, make_node, make_opsetid
from onnx.numpy_helper import from_array, to_array
from torch import nn

BLOCK = 32  # weights that share a scale and a zero point
DOMAIN = "com.microsoft"
QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")
# Candidate widths of a block's range: clipping its extremes a little lowers the squared error of the rest.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix: codes [rows, padded columns] and zero points [rows, blocks] uint8, scales [rows, blocks]."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    def dequantize(self, columns: int) -> np.ndarray:
        """Return the float32 matrix [rows, columns]."""
        rows, blocks = self.scales.shape
        codes = self.codes.reshape(rows, blocks, -1).astype(np.float32)  # [rows, blocks, BLOCK]
        matrix = (codes - self.zero_points[..., None].astype(np.float32)) * self.scales[..., None]
        return np.ascontiguousarray(matrix.reshape(rows, -1)[:, :columns])


def quantize_blocks(matrix: np.ndarray, bits: int) -> Blocks:
    """Round a float32 matrix [rows, columns]; each block takes the candidate range of least squared error."""
    rows, columns = matrix.shape
    padded = np.pad(matrix, ((0, 0), (0, -columns % BLOCK)))
    x = padded.reshape(rows, -1, BLOCK)  # [rows, blocks, BLOCK]
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)  # [rows, blocks]
    best: Blocks | None = None
    best_error = np.full(low.shape, np.inf)
    for shrink in SHRINK:
        tried = _round(x, low * shrink, high * shrink, bits)
        error = ((tried.dequantize(x.shape[1] * BLOCK).reshape(x.shape) - x) ** 2).sum(-1)  # [rows, blocks]
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = tried if best is None else _merge(better, tried, best)
    assert best is not None
    return best


def _round(x: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int) -> Blocks:
    top = 2**bits - 1
    scales = np.where(high > low, (high - low) / top, 1.0).astype(np.float32)  # [rows, blocks]
    zero_points = np.clip(np.round(-low / scales), 0, top).astype(np.uint8)
    codes = np.clip(np.round(x / scales[..., None]) + zero_points[..., None], 0, top).astype(np.uint8)
    return Blocks(codes.reshape(len(x), -1), scales, zero_points)


def _merge(take: np.ndarray, new: Blocks, old: Blocks) -> Blocks:
    columns = np.repeat(take, BLOCK, axis=1)  # [rows, padded columns]
    return Blocks(
        np.where(columns, new.codes, old.codes),
        np.where(take, new.scales, old.scales),
        np.where(take, new.zero_points, old.zero_points),
    )


def name_matrices(model: onnx.ModelProto, module: nn.Module) -> None:
    """Give the matrices of MatMul and Gather nodes back the parameter names that the exporter took from them.

    Args:
        model: the exported graph, changed in place.
        module: what the parameters are named in (the checkpoint's model).
    Raises:
        ValueError: a constant matrix is no parameter, so the graph computes something that was not trained.
    """
    # By operator, because an embedding and a head that share a parameter are two names, rounded differently.
    known = {
        (operator, _digest(layer.weight.detach().numpy())): f"{name}.weight"
        for operator, kind in (("MatMul", nn.Linear), ("Gather", nn.Embedding))
        for name, layer in module.named_modules()
        if isinstance(layer, kind)
    }
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        if (slot := _matrix_slot(node, tensors)) is not None:
            tensor = tensors[node.input[slot]]
            array = to_array(tensor)
            key = node.op_type, _digest(array.T if node.op_type == "MatMul" else array)
            if key not in known:
                raise ValueError(f"{node.name}: the constant {tensor.name} {list(array.shape)} is no parameter.")
            renamed[tensor.name] = known[key]
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)


def quantize(model: onnx.ModelProto, bits: int, accuracy_level: int) -> None:
    """Replace every named matrix of the graph by blocks of `bits`-bit integers, in place.

    Args:
        model: a graph after `name_matrices`.
        bits: 4 or 8.
        accuracy_level: MatMulNBits' own: 0 computes in float32, 4 rounds activations to 8 bits.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    done: dict[str, list[onnx.TensorProto]] = {}
    nodes = []
    for node in model.graph.node:
        slot = _matrix_slot(node, tensors)
        if slot is None:
            nodes.append(node)
            continue
        name, is_matmul = node.input[slot], node.op_type == "MatMul"
        matrix = to_array(tensors[name]).T if is_matmul else to_array(tensors[name])  # [rows, columns]
        if name not in done:
            done[name] = _pack(name, quantize_blocks(np.ascontiguousarray(matrix), bits), bits, is_matmul)
        packed = [tensor.name for tensor in done[name]]
        nodes.append(_quantized_node(node, packed, matrix.shape, bits, accuracy_level))
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in done]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([*kept, *(tensor for tensors in done.values() for tensor in tensors)])
    model.opset_import.append(make_opsetid(DOMAIN, 1))


def _quantized_node(
    node: onnx.NodeProto, packed: list[str], shape: tuple[int, ...], bits: int, accuracy_level: int
) -> onnx.NodeProto:
    """The node that does the same with a packed matrix: names of codes, scales, zero points; shape [rows, columns]."""
    codes, scales, zero_points = packed
    settings: dict[str, Any] = {"domain": DOMAIN, "bits": bits, "block_size": BLOCK}
    if node.op_type == "MatMul":
        inputs = [node.input[0], codes, scales, zero_points]
        settings |= {"K": shape[1], "N": shape[0], "accuracy_level": accuracy_level}
        return make_node("MatMulNBits", inputs, node.output, node.name, **settings)
    inputs = [codes, node.input[1], scales, zero_points]
    settings |= {"gather_axis": 0, "quantize_axis": 1}
    return make_node("GatherBlockQuantized", inputs, node.output, node.name, **settings)


def read_quantized(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Dequantize every quantized matrix of a graph: parameter name -> float32 [rows, columns]."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        if node.op_type in QUANTIZED:
            codes, scales, zero_points = (to_array(tensors[name]) for name in node.input if name in tensors)
            bits = get_node_attr_value(node, "bits")
            rows, blocks = len(codes), scales.size // len(codes)
            columns = get_node_attr_value(node, "K") if node.op_type == "MatMulNBits" else blocks * BLOCK
            name = next(name for name in node.input if name in tensors).removesuffix(".codes")
            matrix = Blocks(
                _unpack(codes.reshape(rows, -1), bits)[:, : blocks * BLOCK],
                scales.reshape(rows, blocks),
                _unpack(zero_points.reshape(rows, -1), bits)[:, :blocks],
            )
            found[name] = matrix.dequantize(columns)
    return found


def _pack(name: str, blocks: Blocks, bits: int, is_matmul: bool) -> list[onnx.TensorProto]:
    codes, zero_points = blocks.codes, blocks.zero_points
    if bits == 4:
        codes, zero_points = _pair(codes), _pair(zero_points)
    if is_matmul:
        codes = codes.reshape(*blocks.scales.shape, -1)  # [out, blocks, bytes of a block]
    parts = {"codes": codes, "scales": blocks.scales, "zero_points": zero_points}
    return [from_array(np.ascontiguousarray(array), f"{name}.{part}") for part, array in parts.items()]


def _pair(values: np.ndarray) -> np.ndarray:
    """Put two 4-bit values into each byte, the first one low: [rows, n] -> [rows, ceil(n / 2)]."""
    values = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return np.asarray(values[:, ::2] | values[:, 1::2] << 4)


def _unpack(values: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return values
    return np.stack((values & 15, values >> 4), -1).reshape(len(values), -1)  # [rows, 2 n]


def _matrix_slot(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto]) -> int | None:
    """Which input of a MatMul or Gather is a constant matrix of weights; position tables are indexed by constants."""
    slot = {"MatMul": 1, "Gather": 0}.get(node.op_type)
    if slot is None or node.input[slot] not in tensors or len(tensors[node.input[slot]].dims) != 2:
        return None
    return None if node.op_type == "Gather" and node.input[1] in tensors else slot


def _digest(matrix: np.ndarray) -> str:
    return f"{matrix.shape} {hashlib.sha256(np.ascontiguousarray(matrix).tobytes()).hexdigest()}"
