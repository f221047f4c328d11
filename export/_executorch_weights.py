"""Reads a model.pte back: the quantized weights that its XNNPACK delegates and its embedding table really hold."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack import serialization
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary
from executorch.exir.schema import DataLocation, KernelCall, Tensor

INT4_ZERO = 8  # XNNPACK stores 4-bit weights unsigned, two per byte, the even column in the low half
_SCHEMA = Path(str(serialization.__path__[0])) / "schema.fbs"
_XNNPACK = "XnnpackBackend"


@dataclass(frozen=True)
class Program:
    """A parsed model.pte."""

    file: PTEFile
    named: dict[str, bytes]


def read_program(path: Path) -> Program:
    """Parse a model.pte."""
    file = deserialize_pte_binary(path.read_bytes())
    store = file.named_data
    entries = {} if store is None else store.pte_data
    return Program(file, {key: bytes(store.buffers[entry.buffer_index]) for key, entry in entries.items()})


def linear_weights(program: Program, method: str) -> Iterator[torch.Tensor]:
    """Yield the dequantized weight [out, in] of every quantized linear of `method`, in order of execution."""
    plan = next(plan for plan in program.file.program.execution_plan if plan.name == method)
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if hasattr(call, "delegate_index") and plan.delegates[call.delegate_index].id == _XNNPACK:
            yield from _delegate_weights(program, _payload(program, plan.delegates[call.delegate_index]))


def byte_embedding(program: Program) -> torch.Tensor:
    """Return the dequantized embedding table [vocabulary, D]."""
    plan = next(plan for plan in program.file.program.execution_plan if plan.name == "token_embedding")
    calls = [i.instr_args for i in plan.chains[0].instructions if isinstance(i.instr_args, KernelCall)]
    lookup = next(c for c in calls if plan.operators[c.op_index].name == "quantized_decomposed::embedding_byte")
    rows, scales = (_constant(program, plan.values[index].val) for index in lookup.args[:2])
    return rows.float() * scales.float()[:, None]  # [vocabulary, D]


def _constant(program: Program, tensor: Any) -> torch.Tensor:
    assert isinstance(tensor, Tensor)
    data = program.file.program.constant_buffer[tensor.data_buffer_idx].storage
    dtype = torch.int8 if tensor.scalar_type.name == "CHAR" else torch.float32
    return torch.frombuffer(bytearray(data), dtype=dtype).view(*tensor.sizes)


def _payload(program: Program, delegate: Any) -> bytes:
    if delegate.processed.location != DataLocation.INLINE:
        raise ValueError(f"delegate data at {delegate.processed.location} was not restored from its segment")
    return bytes(program.file.program.backend_delegate_data[delegate.processed.index].data)


def _delegate_weights(program: Program, payload: bytes) -> Iterator[torch.Tensor]:
    """Yield the quantized filters of a delegate's fully connected nodes."""
    graph = _graph(payload)
    values = {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        values[union.get("tensor_value", union)["id_out"]] = union
    for node in graph["xnodes"]:
        if node["xnode_union_type"] == "XNNFullyConnected":
            weight = values[node["xnode_union"]["filter_id"]]
            if "quant_params" in weight:
                yield _dequantize(program, graph, weight)


def _dequantize(program: Program, graph: dict[str, Any], weight: dict[str, Any]) -> torch.Tensor:
    def constant(index: int) -> bytes:
        return program.named[graph["constant_data"][index]["named_key"]]

    tensor, params = weight["tensor_value"], weight["quant_params"]
    rows, columns = tensor["dims"]
    data = np.frombuffer(constant(tensor["constant_buffer_idx"]), np.uint8)
    scales = bytearray(constant(params["scale_buffer_idx"]))
    if tensor["datatype"] == "xnn_datatype_qbint4":
        integers = np.stack((data & 15, data >> 4), -1).reshape(rows, columns).astype(np.float32) - INT4_ZERO
        scale = torch.frombuffer(scales, dtype=torch.bfloat16).float().view(rows, -1)  # [out, in / group]
        return torch.from_numpy(integers) * scale.repeat_interleave(params["group_size"], 1)  # [out, in]
    if tensor["datatype"] == "xnn_datatype_qcint8":
        integers = data.view(np.int8).reshape(rows, columns).astype(np.float32)
        return torch.from_numpy(integers) * torch.frombuffer(scales, dtype=torch.float32)[:, None]  # [out, in]
    raise ValueError(f"a linear's weight is {tensor['datatype']}; 4-bit blocks or 8-bit channels expected")


def _graph(payload: bytes) -> dict[str, Any]:
    """Decode a delegate's payload (header, flatbuffer, constants) with the wheel's flatc."""
    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "graph.bin"
        binary.write_bytes(payload[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _flatc_decompile(folder, str(_SCHEMA), str(binary), ["--raw-binary"])
        graph: dict[str, Any] = json.loads((Path(folder) / "graph.json").read_text())
    return graph
