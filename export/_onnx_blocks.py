"""Block quantization as ONNX Runtime's operators store it: MatMulNBits and GatherBlockQuantized.

Both hold a matrix [rows, columns] row by row: a linear layer's [out, in], a table's [vocabulary, D]. Each run of
`block` columns has a scale and a zero point: w = (q - zero_point) * scale (onnxruntime/docs/ContribOperators.md). A
symmetric block has no zero point of its own; it is 2 ** (bits - 1).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx
from onnx.numpy_helper import from_array

# Candidate widths of a block's range: clipping its extremes a little lowers the squared error of the rest.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
CHUNK = 1 << 17  # weights rounded at a time, so that the candidates stay in the processor's cache
WORKERS = 2


@dataclass(frozen=True)
class Rounding:
    """How a matrix is rounded: `bits` per weight, `block` weights to a scale, symmetric or with a zero point."""

    bits: int
    block: int
    symmetric: bool = False


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


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix: codes [rows, padded columns] and zero points [rows, blocks] uint8, scales [rows, blocks]."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    def dequantize(self, columns: int) -> np.ndarray:
        """Return the float32 matrix [rows, columns]."""
        rows, blocks = self.scales.shape
        codes = self.codes.reshape(rows, blocks, -1).astype(np.float32)  # [rows, blocks, block]
        matrix = (codes - self.zero_points[..., None].astype(np.float32)) * self.scales[..., None]
        return np.ascontiguousarray(matrix.reshape(rows, -1)[:, :columns])


def quantize_blocks(matrix: np.ndarray, rounding: Rounding) -> Blocks:
    """Round a float32 matrix [rows, columns]; each block takes the candidate range of least squared error."""
    rows, columns = matrix.shape
    step = max(1, CHUNK // columns)
    parts = [matrix[start : start + step] for start in range(0, rows, step)]
    with ThreadPoolExecutor(WORKERS) as pool:
        done = list(pool.map(lambda part: _quantize_rows(part, rounding), parts))
    return Blocks(*(np.concatenate([getattr(part, name) for part in done]) for name in Blocks.__annotations__))


def _quantize_rows(matrix: np.ndarray, rounding: Rounding) -> Blocks:
    rows, columns = matrix.shape
    padded = np.pad(matrix.astype(np.float32, copy=False), ((0, 0), (0, -columns % rounding.block)))
    # A block is a column here: what it shares then runs along whole rows, which is what the processor is fast at.
    x = np.ascontiguousarray(padded.reshape(-1, rounding.block).T)  # [block, rows * blocks]
    codes, top = np.empty_like(x), 2**rounding.bits - 1
    scales, zero_points = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
    best = np.full(x.shape[1], np.inf, np.float32)  # [rows * blocks]
    tried, difference = np.empty_like(x), np.empty_like(x)
    for scale, zero_point in _ranges(x, rounding):
        np.rint(np.divide(x, scale, out=tried), out=tried)
        tried += zero_point
        np.clip(tried, 0, top, out=tried)
        np.subtract(tried, zero_point, out=difference)
        difference *= scale
        difference -= x
        difference *= difference
        error = difference.sum(0)  # [rows * blocks]
        better = error < best
        np.copyto(codes, tried, where=better)
        for kept, new in ((best, error), (scales, scale), (zero_points, zero_point)):
            np.copyto(kept, new, where=better)
    return Blocks(
        np.ascontiguousarray(codes.astype(np.uint8).T).reshape(rows, -1),
        scales.reshape(rows, -1),
        zero_points.astype(np.uint8).reshape(rows, -1),
    )


def _ranges(x: np.ndarray, rounding: Rounding) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scales and zero points [n], float32, of each candidate range of the blocks x [block, n]."""
    top, middle = 2**rounding.bits - 1, 2 ** (rounding.bits - 1)
    low, high = np.minimum(x.min(0), 0), np.maximum(x.max(0), 0)  # [n]
    # Symmetric: there is one more code below zero than above; the block's extreme takes it, whatever its sign.
    extreme = np.where(-low > high, low, high)  # [n]
    for shrink in SHRINK:
        width = extreme * shrink / -middle if rounding.symmetric else (high * shrink - low * shrink) / top
        scale = np.where(width != 0, width, 1.0).astype(np.float32)
        if rounding.symmetric:
            yield scale, np.full(scale.shape, middle, np.float32)
        else:
            yield scale, np.clip(np.round(-(low * shrink) / scale), 0, top).astype(np.float32)


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
