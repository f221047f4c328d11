"""An interpreter for saved Core ML programs (.mlpackage, MIL) in NumPy: checks a program where Apple's runtime is not.

It executes the operations that are in the file on the weights that are in the file, in float32. It says nothing about
Apple's kernels, their float16 accumulation or their speed.
"""

import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from vlm.errors import UserError
from vlm.runtimes._mil_ops import OPERATIONS

_SENTINEL = 0xDEADBEEF  # starts the 64-byte description of each tensor in weight.bin
_DTYPES: dict[str, Any] = {
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
}
_DTYPES |= {"INT16": np.int16, "UINT16": np.uint16, "BOOL": np.bool_, "INT64": np.int64}
_STATEFUL = ("read_state", "write_state", "coreml_update_state")


@cache
def coremltools() -> Any:
    """Import coremltools, without its remarks on versions, and without torch unless the process has it already.

    coremltools imports torch, transformers and scikit-learn only because they are installed; reading a program needs
    none of them. An exporting process has imported torch before and gets coremltools whole.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    blocked = (
        set() if "torch" in sys.modules else {"torch", "transformers", "sklearn", "tensorflow"} - sys.modules.keys()
    )
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]  # None makes an import fail
    try:
        return importlib.import_module("coremltools")
    finally:
        for name in blocked:
            sys.modules.pop(name, None)


def read_spec(package: Path) -> Any:
    """Parse the model description of an .mlpackage (a protobuf `Model`).

    Raises:
        UserError: the package is incomplete or holds no ML program.
    """
    try:
        index = json.loads((package / "Manifest.json").read_text())
        path = package / "Data" / index["itemInfoEntries"][index["rootModelIdentifier"]]["path"]
        spec = coremltools().proto.Model_pb2.Model.FromString(path.read_bytes())
    except (OSError, KeyError, ValueError, DecodeError) as error:
        raise UserError(f"{package}: not a complete .mlpackage ({error}). Export the artifact again.") from error
    if not spec.HasField("mlProgram"):
        raise UserError(f"{package}: an ML program was expected, found {spec.WhichOneof('Type')}. Export it again.")
    return spec


def block_of(spec: Any) -> Any:
    """Return the block of operations of a program's main function."""
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


class Constants:
    """Decodes a package's constants, from the description or from weight.bin."""

    def __init__(self, package: Path) -> None:
        self._folder = package / "Data" / "com.apple.CoreML"
        self._files: dict[str, np.ndarray] = {}

    def value(self, value: Any) -> Any:
        """Decode a MIL `Value`: an array as it is stored (float16, int8; 4 bits as int8), or a string."""
        kind = value.type.tensorType
        name = coremltools().proto.MIL_pb2.DataType.Name(kind.dataType)
        shape = [dimension.constant.size for dimension in kind.dimensions]
        if value.WhichOneof("value") == "blobFileValue":
            return _decode(self._blob(value.blobFileValue), name, shape)
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        values = getattr(tensor, field).values
        if field == "bytes":
            return _decode(np.frombuffer(values, np.uint8), name, shape)
        return values[0] if field == "strings" else np.array(values, _DTYPES[name]).reshape(shape)

    def _blob(self, reference: Any) -> np.ndarray:
        name = reference.fileName.removeprefix("@model_path/")
        if name not in self._files:
            self._files[name] = np.memmap(self._folder / name, np.uint8, "r")
        file = self._files[name]
        sentinel, _, low, high, start_low, start_high = file[reference.offset : reference.offset + 24].view(np.uint32)
        if sentinel != _SENTINEL:
            raise UserError(f"{self._folder / name}: no tensor at byte {reference.offset}. Export the artifact again.")
        start, size = int(start_low) | int(start_high) << 32, int(low) | int(high) << 32
        return file[start : start + size]


def _decode(raw: np.ndarray, name: str, shape: list[int]) -> np.ndarray:
    if name in ("INT4", "UINT4"):  # two per byte, the lower half first
        nibbles = np.stack((raw & 15, raw >> 4), -1).reshape(-1)[: int(np.prod(shape))].astype(np.int8)
        return (nibbles if name == "UINT4" else (nibbles ^ 8) - 8).reshape(shape)
    if name not in _DTYPES:
        raise UserError(f"a constant of type {name} was found; known are INT4, UINT4, {', '.join(_DTYPES)}.")
    return np.frombuffer(raw.tobytes(), _DTYPES[name]).reshape(shape)


def constants(package: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, float32 values) of every float constant of a saved program, quantized ones dequantized."""
    reader, plain = Constants(package), {}
    for operation in block_of(read_spec(package)).operations:
        if operation.type == "const":
            name = operation.outputs[0].name
            value = plain[name] = reader.value(operation.attributes["val"])
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                yield name, value.astype(np.float32)
        elif operation.type.startswith("constexpr_"):
            arguments = {key: values[0] for key, values in _fixed(operation, plain, reader).items()}
            yield operation.outputs[0].name, OPERATIONS[operation.type](**arguments)


def _fixed(operation: Any, known: dict[str, Any], reader: Constants) -> dict[str, list[Any]]:
    """Values of the inputs that do not depend on the program's inputs; an input with an unknown part is left out."""
    found = {}
    for key, argument in operation.inputs.items():
        parts = argument.arguments
        if all(part.WhichOneof("binding") == "value" or part.name in known for part in parts):
            found[key] = [reader.value(p.value) if p.WhichOneof("binding") == "value" else known[p.name] for p in parts]
    return found


@dataclass(frozen=True, slots=True)
class _Call:
    """An operation's arithmetic; its constant arguments are bound already.

    Attributes:
        function: from OPERATIONS.
        inputs: argument -> name of the value it takes.
        joined: names of the values that the argument `values` lists; empty where there is no such argument.
        output: name of the result.
    """

    function: Callable[..., Any]
    inputs: tuple[tuple[str, str], ...]
    joined: tuple[str, ...]
    output: str

    def run(self, values: dict[str, Any], states: dict[str, np.ndarray]) -> None:
        """Compute the result."""
        arguments: dict[str, Any] = {key: values[name] for key, name in self.inputs}
        if self.joined:
            arguments["values"] = [values[name] for name in self.joined]
        values[self.output] = self.function(**arguments)


@dataclass(frozen=True, slots=True)
class _StateAccess:
    """Reads a state, or writes a value into it; `output` then is the new content, "" where nobody asks for it."""

    state: str
    source: str | None  # name of the value to write; None: read
    output: str

    def run(self, values: dict[str, Any], states: dict[str, np.ndarray]) -> None:
        """Read or write."""
        if self.source is not None:
            states[self.state] = values[self.source]
        if self.output:
            values[self.output] = states[self.state]


class Program:
    """A saved program, compiled once to a list of NumPy calls; keeps the states between calls.

    Args:
        package: the .mlpackage.
    Raises:
        UserError: the package is damaged or uses an operation the interpreter does not know.
    """

    def __init__(self, package: Path) -> None:
        spec = read_spec(package)
        function, block = spec.mlProgram.functions["main"], block_of(spec)
        self.outputs = list(block.outputs)
        self._shapes = {
            entry.name: [d.constant.size for d in entry.type.stateType.wrappedType.tensorType.dimensions]
            for entry in function.inputs
            if entry.type.WhichOneof("type") == "stateType"
        }
        self._steps: list[_Call | _StateAccess] = []
        self._known: dict[str, Any] = {}  # values that do not depend on the inputs
        reader = Constants(package)
        for operation in block.operations:
            self._compile(package, operation, reader)
        self.reset()

    def reset(self) -> None:
        """Set every state to zeros."""
        self.states = {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run the program on its inputs; returns its outputs by name."""
        values = {**self._known, **inputs}
        for step in self._steps:
            step.run(values, self.states)
        return {name: values[name] for name in self.outputs}

    def _compile(self, package: Path, operation: Any, reader: Constants) -> None:
        """Compute the operation now if all its inputs are constants, else add it to the steps."""
        kind, output = operation.type, operation.outputs[0].name if operation.outputs else ""
        if kind == "const":
            self._known[output] = _prepare(reader.value(operation.attributes["val"]))
        elif kind in _STATEFUL:
            self._steps.append(_state_access(operation, output))
        elif kind not in OPERATIONS or len(operation.outputs) != 1:
            raise UserError(
                f"{package}: operation {kind!r} is not one the interpreter knows. It can be run on macOS only."
            )
        else:
            fixed = _fixed(operation, self._known, reader)
            arguments = {key: _prepare(v[0]) if len(v) == 1 and key != "values" else v for key, v in fixed.items()}
            call = partial(OPERATIONS[kind], **arguments)
            moving = {
                key: [part.name for part in a.arguments] for key, a in operation.inputs.items() if key not in fixed
            }
            if moving:
                joined = tuple(moving.pop("values", ()))
                inputs = tuple((key, names[0]) for key, names in moving.items())
                self._steps.append(_Call(call, inputs, joined, output))
            else:
                self._known[output] = _prepare(call())


def _state_access(operation: Any, output: str) -> _StateAccess:
    names = {key: argument.arguments[0].name for key, argument in operation.inputs.items()}
    match operation.type:
        case "read_state":
            return _StateAccess(names["input"], None, output)
        case "write_state":
            return _StateAccess(names["input"], names["data"], output)
        case _:
            return _StateAccess(names["state"], names["value"], output)


def _prepare(value: Any) -> Any:
    """Turn a constant into what its operation reads fastest: float32 arrays, Python numbers, tuples of them."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind == "f":
        return value.astype(np.float32) if value.ndim else float(value)
    if value.ndim == 0:
        return value.item()
    return (
        tuple(value.tolist()) if value.ndim == 1 and value.dtype.kind in "ib" and value.dtype.itemsize != 1 else value
    )
