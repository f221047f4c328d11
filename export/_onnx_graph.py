"""An ONNX file written node by node, its constants streamed to disk as they come, so that no model stands in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_model, set_external_data
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array

DOMAIN = "com.microsoft"
OPSET, IR_VERSION = 21, 10
INLINE_LIMIT = 1 << 28  # bytes of constants inside one .onnx file; more goes to <file>.data, which engines map
SMALL = 1024  # bytes of constants that are always inside: shapes are inferred from them
PAGE = 4096  # engines map constants from multiples of it


class GraphFile:
    """A graph under construction; `constant` and `node` return the name of what they add.

    Args:
        path: the .onnx file; constants go to <path>.data until `close` knows whether they are few.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = data_path(path).open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add a constant once; the same name again is the same constant."""
        if name not in self._constants:
            tensor = from_array(np.ascontiguousarray(array) if array.ndim else array, name)
            if array.nbytes > SMALL:
                self._data.seek(-self._data.tell() % PAGE, 1)
                set_external_data(tensor, data_path(self.path).name, self._data.tell(), array.nbytes)
                self._data.write(tensor.raw_data)
                tensor.ClearField("raw_data")
            self._constants[name] = tensor
        return name

    def node(self, operator: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        """Add a node; outputs that are not wanted are empty names."""
        self._nodes.append(make_node(operator, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def close(self, inputs: dict[str, tuple[type, list[Any]]], outputs: dict[str, tuple[type, list[Any]]]) -> None:
        """Write the file; `inputs` and `outputs` are names with type and shape, whose strings are open sizes."""
        self._data.close()
        graph = make_graph(self._nodes, self.path.stem, _infos(inputs), _infos(outputs), [*self._constants.values()])
        opsets = [make_opsetid("", OPSET), make_opsetid(DOMAIN, 1)]
        model = make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        if data_path(self.path).stat().st_size <= INLINE_LIMIT:
            load_external_data_for_model(model, str(self.path.parent))
            data_path(self.path).unlink()
        onnx.save(model, self.path)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph that stands in memory, its constants beside it if they are many."""
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > INLINE_LIMIT
    onnx.save(model, path, save_as_external_data=large, location=data_path(path).name if large else None)


def data_path(path: Path) -> Path:
    """Where the constants of a large .onnx file lie."""
    return path.with_name(f"{path.name}.data")


def _infos(values: dict[str, tuple[type, list[Any]]]) -> list[onnx.ValueInfoProto]:
    return [
        make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)
        for name, (kind, shape) in values.items()
    ]
