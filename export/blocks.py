"""Block quantization: integers, and for each run of `block` columns a scale and a zero point.

w = (q - zero_point) * scale. The grid of a block, its scale and zero point, is the candidate of least squared error;
the integers are the nearest on it, or GPTQ's (export.gptq).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from export.gptq import compensated_codes

# Candidate widths of a block's range: clipping its extremes a little lowers the squared error of the rest.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
CHUNK = 1 << 17  # weights rounded at a time, so that the candidates stay in the processor's cache
WORKERS = 2
GPTQ_ROWS = 512  # rounded at a time by each worker
SCALES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Rounding:
    """How a matrix is rounded.

    Attributes:
        bits: per weight.
        block: columns that share a scale.
        symmetric: the zero point is 2 ** (bits - 1), else every block has its own.
        scale: type the scales are stored in, "float32", "float16" or "bfloat16".
        positive: the engine takes no negative scales (symmetric blocks only); with them a block's extreme value,
            whatever its sign, gets the one code that there is more below zero than above.
    """

    bits: int
    block: int
    symmetric: bool = False
    scale: str = "float32"
    positive: bool = False


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


def quantize_blocks(matrix: np.ndarray, rounding: Rounding, factor: np.ndarray | None = None) -> Blocks:
    """Round a matrix.

    Args:
        matrix: float32 [rows, columns].
        rounding: how.
        factor: of the inputs' second moments [columns, columns] (`export.gptq.inverse_factor`): the integers are chosen
            for the matrix's products; None: for its values.
    """
    rows, columns = matrix.shape
    step = max(1, CHUNK // columns)
    parts = [matrix[start : start + step] for start in range(0, rows, step)]
    with ThreadPoolExecutor(WORKERS) as pool:
        done = list(pool.map(lambda part: _quantize_rows(part, rounding), parts))
        found = Blocks(*(np.concatenate([getattr(part, name) for part in done]) for name in Blocks.__annotations__))
        if factor is None:
            return found
        slices = [slice(start, start + GPTQ_ROWS) for start in range(0, rows, GPTQ_ROWS)]
        codes = list(pool.map(lambda part: _compensated(matrix[part], found, part, rounding, factor), slices))
    found.codes[:, :columns] = np.concatenate(codes)
    return found


def _compensated(matrix: np.ndarray, blocks: Blocks, part: slice, rounding: Rounding, factor: np.ndarray) -> np.ndarray:
    scales, zero_points = blocks.scales[part], blocks.zero_points[part].astype(np.float32)
    return compensated_codes(matrix, scales, zero_points, rounding.block, 2**rounding.bits - 1, factor)


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
    if rounding.positive:
        widest = np.maximum(low / -middle, high / (top - middle))  # [n]
    elif rounding.symmetric:  # the block's extreme, whatever its sign, takes the lowest code
        widest = np.where(-low > high, low, high) / -middle
    else:
        widest = (high - low) / top
    for shrink in SHRINK:
        scale = (widest * np.float32(shrink)).astype(SCALES[rounding.scale]).astype(np.float32)
        scale[scale == 0] = 1.0  # of zeros, or of what the scales' type cannot tell from zero
        if rounding.symmetric:
            yield scale, np.full(scale.shape, middle, np.float32)
        else:
            yield scale, np.clip(np.round(-(low * shrink) / scale), 0, top).astype(np.float32)
