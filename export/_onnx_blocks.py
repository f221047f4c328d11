"""Block quantization as ONNX Runtime's operators store it: MatMulNBits and GatherBlockQuantized.

Both hold a matrix [rows, columns] row by row: a linear layer's [out, in], a table's [vocabulary, D]. Each run of
`block` columns has a scale and a zero point (onnxruntime/docs/ContribOperators.md). A symmetric block has no zero point
of its own; it is 2 ** (bits - 1).
"""

import numpy as np
import onnx
from onnx.numpy_helper import from_array

from export.blocks import Blocks, Rounding

ROUNDINGS = {
    "int8": Rounding(8, 32),
    "int8-128": Rounding(8, 128),
    "int8-sym": Rounding(8, 32, True),
    "int8-sym-128": Rounding(8, 128, True),
    "int4": Rounding(4, 32),
    "int4-128": Rounding(4, 128),
    "int4-sym": Rounding(4, 32, True),
    "int4-sym-128": Rounding(4, 128, True),
}


def pack(blocks: Blocks, rounding: Rounding, columns: int, is_linear: bool) -> dict[str, np.ndarray]:
    """The operators' inputs: codes, scales and, unless symmetric, zero points; two 4-bit values to a byte.

    A linear layer's codes are padded to whole blocks, a table's are its `columns`.
    """
    codes, zero_points = blocks.codes if is_linear else blocks.codes[:, :columns], blocks.zero_points
    if rounding.bits == 4:
        codes, zero_points = _pair(codes), _pair(zero_points)
    if is_linear:
        codes = codes.reshape(*blocks.scales.shape, -1)  # [out, blocks, bytes of a block]
    parts = {"codes": codes, "scales": blocks.scales, "zero_points": zero_points}
    if rounding.symmetric:
        del parts["zero_points"]
    return {part: np.ascontiguousarray(array) for part, array in parts.items()}


def unpack(parts: dict[str, np.ndarray], rounding: Rounding, columns: int) -> np.ndarray:
    """The float32 matrix [rows, columns] that `pack` made parts of."""
    rows = len(parts["codes"])
    scales = parts["scales"].reshape(rows, -1)  # [rows, blocks]
    codes = _spread(parts["codes"].reshape(rows, -1), rounding.bits)  # [rows, columns], padded or not
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % rounding.block)))
    zero_points = np.full(scales.shape, 2 ** (rounding.bits - 1), np.uint8)
    if not rounding.symmetric:
        zero_points = _spread(parts["zero_points"].reshape(rows, -1), rounding.bits)[:, : scales.shape[1]]
    return Blocks(codes, scales, zero_points).dequantize(columns)


def constants(name: str, parts: dict[str, np.ndarray]) -> list[onnx.TensorProto]:
    """The parts of a packed matrix as a graph's constants "<name>.<part>"."""
    return [from_array(array, f"{name}.{part}") for part, array in parts.items()]


def _pair(values: np.ndarray) -> np.ndarray:
    """Put two 4-bit values into each byte, the first one low: [rows, n] -> [rows, ceil(n / 2)]."""
    values = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return np.asarray(values[:, ::2] | values[:, 1::2] << 4)


def _spread(values: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return values
    return np.stack((values & 15, values >> 4), -1).reshape(len(values), -1)  # [rows, 2 n]
