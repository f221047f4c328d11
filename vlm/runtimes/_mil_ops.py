"""The arithmetic of MIL operations in NumPy, by their names in Apple's reference, float32 throughout.

Every function takes MIL's argument names. Integers and flags fixed in the program arrive as Python numbers, tuples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
_windows: Callable[..., Array] = np.lib.stride_tricks.sliding_window_view
_TYPES = {
    "fp16": np.float32,
    "fp32": np.float32,
    "int32": np.int32,
    "int16": np.int32,
    "uint16": np.int32,
    "bool": bool,
}


def _ints(values: Any) -> list[int]:
    return [int(value) for value in (values if isinstance(values, tuple) else np.asarray(values).reshape(-1))]


def _axes(values: Any) -> tuple[int, ...]:
    return tuple(_ints(values))


def cast(x: Any, dtype: str) -> Array:
    """Change the type; float16 is computed as float32."""
    return np.asarray(x).astype(_TYPES[dtype])


def concat(values: Sequence[Any], axis: int, interleave: bool = False) -> Array:
    """Join along an axis; scalars count as vectors of one."""
    return np.concatenate([np.atleast_1d(value) for value in values], axis)


def conv(
    x: Array,
    weight: Array,
    strides: Any,
    pad_type: str = "valid",
    pad: Any = (0, 0, 0, 0),
    dilations: Any = (1, 1),
    groups: int = 1,
    bias: Array | None = None,
) -> Array:
    """Convolve [1, C, H, W] with [O, C / groups, h, w]: patches (stride = kernel), pointwise and depthwise kernels."""
    top, bottom, left, right = (0, 0, 0, 0) if pad_type == "valid" else _ints(pad)
    if pad_type not in ("valid", "custom") or set(_ints(dilations)) != {1}:
        raise ValueError(f"conv with pad_type {pad_type}, dilations {dilations}")
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    down, across = _ints(strides)
    windows = _windows(x[0], weight.shape[2:], axis=(1, 2))[:, ::down, ::across]  # [C, H, W, h, w]
    if groups == 1:
        y = np.tensordot(weight, windows, ([1, 2, 3], [0, 3, 4]))  # [O, H, W]
    elif groups == len(x[0]) == len(weight):
        y = np.einsum("chwyx,cyx->chw", windows, weight[:, 0])  # [O, H, W]
    else:
        raise ValueError(f"conv with {groups} groups for {len(x[0])} channels")
    return (y if bias is None else y + bias[:, None, None])[None]  # [1, O, H, W]


def avg_pool(x: Array, kernel_sizes: Any, strides: Any, pad_type: str = "valid", **rest: Any) -> Array:
    """Average windows that do not overlap: [1, C, H, W] -> [1, C, H / h, W / w]."""
    high, wide = _ints(kernel_sizes)
    if _ints(strides) != [high, wide] or any(_ints(rest.get("pad", (0,)))) or x.shape[2] % high or x.shape[3] % wide:
        raise ValueError(f"avg_pool with kernel {kernel_sizes}, strides {strides}")
    return x.reshape(*x.shape[:2], x.shape[2] // high, high, x.shape[3] // wide, wide).mean((3, 5))


def expand_dims(x: Any, axes: Any) -> Array:
    """Insert axes of length 1."""
    return np.expand_dims(x, _axes(axes))


def gather(x: Any, indices: Any, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    """Take rows, columns ... by index."""
    return np.take(x, indices, axis)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """Gaussian error linear unit; erf by Abramowitz and Stegun 7.1.26, error below 2e-7."""
    if mode != "EXACT":
        raise ValueError(f"gelu with mode {mode}")
    z = np.abs(x) * np.float32(0.5**0.5)
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return 0.5 * x * (1 + np.sign(x) * (1 - series * np.exp(-z * z)))


def layer_norm(
    x: Array, axes: Any, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:
    """Normalise to mean 0 and variance 1, then scale and shift."""
    over = _axes(axes)
    centred = x - x.mean(over, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(over, keepdims=True) + epsilon)
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., in] times weight [out, in], plus bias [out]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """Matrix product over the last two axes."""
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)


def reshape(x: Array, shape: Any) -> Array:
    """Reshape; 0 keeps an axis, -1 is what is left."""
    return np.reshape(x, [x.shape[axis] if size == 0 else size for axis, size in enumerate(_ints(shape))])


def softmax(x: Array, axis: int = -1) -> Array:
    """Exponentials that sum to 1 along an axis."""
    y = x - x.max(axis, keepdims=True)
    np.exp(y, out=y)
    y /= y.sum(axis, keepdims=True)
    return y


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(d) + mask) v."""
    scores = (query * np.float32(query.shape[-1] ** -0.5)) @ key.swapaxes(-1, -2)  # [1, H, N, T]
    return softmax(scores if attn_mask is None else scores + attn_mask) @ value


def _slices(x: Array, begin: Any, end: Any, **rest: Any) -> tuple[Any, ...]:
    """MIL's begin, end, stride and masks as an index; a squeezed axis is one number."""
    strides = _ints(rest.get("stride", (1,) * x.ndim))
    masks = (rest.get(f"{name}_mask", (False,) * x.ndim) for name in ("begin", "end", "squeeze"))
    rows = zip(_ints(begin), _ints(end), strides, *masks, strict=True)
    return tuple(
        b if gone else slice(None if first else b, None if last else e, s) for b, e, s, first, last, gone in rows
    )


def slice_by_index(x: Array, begin: Any, end: Any, **rest: Any) -> Array:
    """Read a slice."""
    return np.asarray(x)[_slices(np.asarray(x), begin, end, **rest)]


def slice_update(x: Array, update: Array, begin: Any, end: Any, **rest: Any) -> Array:
    """Return x with a slice replaced."""
    y = x.copy()
    y[_slices(x, begin, end, **rest)] = update
    return y


def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """Dequantize: (data - offset) * scale, where scale and offset hold one value per block along each axis."""
    for axis, size in enumerate(data.shape):
        scale = np.repeat(scale, size // scale.shape[axis], axis)
        offset = offset if offset is None else np.repeat(offset, size // offset.shape[axis], axis)
    return ((data if offset is None else data - offset.astype(np.float32)) * scale).astype(np.float32)


def constexpr_lut_to_dense(indices: Array, lut: Array, vector_axis: Any = None) -> Array:
    """Look palettized values up: indices [R, C] in palettes [groups of rows, groups of columns, values, 1]."""
    if indices.ndim != 2 or lut.shape[-1] != 1:
        raise ValueError(f"constexpr_lut_to_dense with indices {indices.shape}, lut {lut.shape}")
    high, wide = (size // count for size, count in zip(indices.shape, lut.shape, strict=False))
    rows, columns = np.arange(indices.shape[0]) // high, np.arange(indices.shape[1]) // wide
    return lut[rows[:, None], columns, indices, 0].astype(np.float32)  # [R, C]


def _mean(x: Array, axes: Any, keep_dims: bool = False) -> Array:
    return x.mean(_axes(axes), keepdims=keep_dims)


def _largest(x: Array, axes: Any, keep_dims: bool = False) -> Array:
    return x.max(_axes(axes), keepdims=keep_dims)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: np.abs(x),
    "add": lambda x, y: x + y,
    "avg_pool": avg_pool,
    "cast": cast,
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "concat": concat,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "conv": conv,
    "expand_dims": expand_dims,
    "gather": gather,
    "gelu": gelu,
    "greater_equal": lambda x, y: np.greater_equal(x, y),
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "layer_norm": layer_norm,
    "linear": linear,
    "matmul": matmul,
    "maximum": lambda x, y: np.maximum(x, y),
    "mul": lambda x, y: x * y,
    "pow": lambda x, y: x * x if y == 2 else x**y,
    "real_div": lambda x, y: x / y,
    "reduce_max": _largest,
    "reduce_mean": _mean,
    "reshape": reshape,
    "rsqrt": lambda x, epsilon=0.0: 1 / np.sqrt(x + epsilon),
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "select": lambda cond, a, b: np.where(cond, a, b),
    "shape": lambda x: np.array(x.shape, np.int32),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "slice_by_index": slice_by_index,
    "slice_update": slice_update,
    "softmax": softmax,
    "sub": lambda x, y: x - y,
    "tile": lambda x, reps: np.tile(x, _ints(reps)),
    "transpose": lambda x, perm: np.transpose(x, _axes(perm)),
}
