"""Weight matrices inside a traced ONNX graph: their names in the checkpoint, their storage, and the way back."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx.helper import get_node_attr_value, make_node, make_opsetid
from onnx.numpy_helper import from_array, to_array
from torch import nn

from export._onnx_blocks import ROUNDINGS, constants, pack, unpack
from export._onnx_graph import DOMAIN
from export.blocks import Blocks, Rounding, quantize_blocks

QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")
# 8-bit weights with a scale per output, multiplied as integers by inputs that are rounded to 8 bits per call: on
# processors with integer dot products three times as fast as any block format, but one outlier coarsens all inputs.
DYNAMIC, DYNAMIC_OPERATOR = "int8-dynamic", "DynamicQuantizeMatMul"


def name_matrices(model: onnx.ModelProto, modules: dict[str, nn.Module]) -> None:
    """Give the matrices of MatMul and Gather nodes back the parameter names that the exporter took from them.

    Args:
        model: the exported graph, changed in place.
        modules: what was traced, float32, by the names in the checkpoint's model.
    Raises:
        ValueError: a constant matrix is no parameter, so the graph computes something that was not trained.
    """
    # By operator, because an embedding and a head that share a parameter are two names, rounded differently.
    known = {
        (operator, _digest(layer.weight.detach().numpy())): f"{name}.weight"
        for operator, kind in (("MatMul", nn.Linear), ("Gather", nn.Embedding))
        for name, layer in modules.items()
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


def store(
    model: onnx.ModelProto,
    storage: Callable[[str], str],
    accuracy_level: int,
    quantize: Callable[[np.ndarray, Rounding], Blocks] = quantize_blocks,
) -> None:
    """Replace the named matrices of a graph by what they are stored as, in place.

    Args:
        model: a graph after `name_matrices`.
        storage: parameter name -> "fp32", "fp16", DYNAMIC (linear layers only) or a name of ROUNDINGS.
        accuracy_level: MatMulNBits' own: 0 computes in float32, 4 rounds activations to 8 bits.
        quantize: rounds a matrix.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    done: dict[str, list[onnx.TensorProto]] = {}
    nodes = []
    for node in model.graph.node:
        slot = _matrix_slot(node, tensors)
        kind = "fp32" if slot is None else storage(node.input[slot])
        if slot is None or kind == "fp32":
            nodes.append(node)
            continue
        name = node.input[slot]
        if kind == "fp16":
            done[name] = [from_array(to_array(tensors[name]).astype(np.float16), name)]
            nodes += _half_nodes(node, slot)
            continue
        if kind == DYNAMIC:
            done[name] = _channels(name, to_array(tensors[name]))
            inputs = [node.input[0], *(tensor.name for tensor in done[name])]
            nodes.append(make_node(DYNAMIC_OPERATOR, inputs, node.output, node.name, domain=DOMAIN))
            continue
        is_linear = node.op_type == "MatMul"
        matrix = to_array(tensors[name]).T if is_linear else to_array(tensors[name])  # [rows, columns]
        if name not in done:
            blocks = quantize(np.ascontiguousarray(matrix), ROUNDINGS[kind])
            done[name] = constants(name, pack(blocks, ROUNDINGS[kind], matrix.shape[1], is_linear))
        packed = [tensor.name for tensor in done[name]]
        nodes.append(_quantized_node(node, packed, matrix.shape, ROUNDINGS[kind], accuracy_level))
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in done]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([*kept, *(tensor for tensors in done.values() for tensor in tensors)])
    model.opset_import.append(make_opsetid(DOMAIN, 1))


def _channels(name: str, matrix: np.ndarray) -> list[onnx.TensorProto]:
    """Codes [in, out] int8 and scales [out] of a matrix [in, out]."""
    scales = np.maximum(np.abs(matrix).max(0), np.finfo(np.float32).tiny) / 127  # [out]
    codes = np.rint(matrix / scales).astype(np.int8)
    return constants(name, {"codes": codes, "scales": scales.astype(np.float32)})


def _half_nodes(node: onnx.NodeProto, slot: int) -> list[onnx.NodeProto]:
    """A float16 matrix is multiplied in float32 (the engine widens it at loading); of a table only the rows are."""
    widened = onnx.NodeProto()
    widened.CopyFrom(node)
    if node.op_type == "Gather":
        widened.output[0] = f"{node.output[0]}.half"
        return [widened, make_node("Cast", [widened.output[0]], [node.output[0]], to=onnx.TensorProto.FLOAT)]
    name = f"{node.input[slot]}.{node.name or node.output[0]}.float"
    widened.input[slot] = name
    return [make_node("Cast", [node.input[slot]], [name], to=onnx.TensorProto.FLOAT), widened]


def _quantized_node(
    node: onnx.NodeProto, packed: list[str], shape: tuple[int, ...], rounding: Rounding, accuracy_level: int
) -> onnx.NodeProto:
    """The node that does the same with a packed matrix: names of codes, scales, zero points; shape [rows, columns]."""
    settings: dict[str, Any] = {"domain": DOMAIN, "bits": rounding.bits, "block_size": rounding.block}
    if node.op_type == "MatMul":
        settings |= {"K": shape[1], "N": shape[0], "accuracy_level": accuracy_level}
        return make_node("MatMulNBits", [node.input[0], *packed], node.output, node.name, **settings)
    inputs = [packed[0], node.input[1], *packed[1:]]
    settings |= {"gather_axis": 0, "quantize_axis": 1}
    return make_node("GatherBlockQuantized", inputs, node.output, node.name, **settings)


def read_stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Every matrix that is stored with fewer than 32 bits: parameter name -> float32 [rows, columns]."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        if node.op_type in QUANTIZED:
            parts = {name.rpartition(".")[2]: to_array(tensors[name]) for name in node.input if name in tensors}
            bits, block = (int(get_node_attr_value(node, key)) for key in ("bits", "block_size"))
            rounding = Rounding(bits, block, "zero_points" not in parts)
            is_linear = node.op_type == "MatMulNBits"
            columns = get_node_attr_value(node, "K") if is_linear else parts["codes"].shape[1] * 8 // bits
            name = next(name for name in node.input if name in tensors).removesuffix(".codes")
            found[name] = unpack(parts, rounding, columns)
        elif node.op_type == DYNAMIC_OPERATOR:
            codes, scales = (to_array(tensors[name]) for name in node.input[1:3])
            matrix = np.ascontiguousarray((codes.astype(np.float32) * scales).T)  # [out, in]
            found[node.input[1].removesuffix(".codes")] = matrix
        elif (name := node.input[0] if node.input else "") in tensors and _is_half(tensors[name]):
            matrix = to_array(tensors[name]).astype(np.float32)
            # Only the traced graphs hold the matrices of linear layers as [in, out]; there a product follows at once.
            is_transposed = node.op_type == "Cast" and any(
                other.op_type == "MatMul" and node.output[0] in other.input for other in model.graph.node
            )
            found[name] = np.ascontiguousarray(matrix.T) if is_transposed else matrix
    return found


def _is_half(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_type == onnx.TensorProto.FLOAT16)


def _matrix_slot(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto]) -> int | None:
    """Which input of a MatMul or Gather is a constant matrix of weights; position tables are indexed by constants."""
    slot = {"MatMul": 1, "Gather": 0}.get(node.op_type)
    if slot is None or node.input[slot] not in tensors or len(tensors[node.input[slot]].dims) != 2:
        return None
    return None if node.op_type == "Gather" and node.input[1] in tensors else slot


def _digest(matrix: np.ndarray) -> str:
    return f"{matrix.shape} {hashlib.sha256(np.ascontiguousarray(matrix).tobytes()).hexdigest()}"
