"""How Core ML stores a matrix: float16, integers with scales, or indices into palettes; one matrix in memory at a time.

The traced graph holds no matrix: `StoredLinear` and `StoredEmbedding` stand in its place and become the operation that
Core ML reads the stored matrix with, when the graph is converted.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from export.blocks import Rounding, quantize_blocks
from export.calibration import LayerInputs
from export.source import release_pages
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes._mil import coremltools

ct = coremltools()
BLOCK = 32  # weights that share a scale in int4
# Apple documents no negative scales; the integers are -8 to 7.
INT4, INT4_ZERO = Rounding(4, BLOCK, symmetric=True, scale="float16", positive=True), 8
PALETTE, PALETTE_ROWS = 16, 16  # values of a palette, and the rows of a matrix that share one
_LLOYD_STEPS = 20
_CACHED = 1 << 18  # numbers that are rounded at a time: they stay in the processor's cache

torch.library.define("pocketvlm::stored_linear", "(Tensor x, int index, int width) -> Tensor")
torch.library.define("pocketvlm::stored_embedding", "(Tensor ids, int index, int width) -> Tensor")


@torch.library.impl("pocketvlm::stored_linear", "cpu")  # type: ignore[misc,unused-ignore]
def _linear(x: torch.Tensor, index: int, width: int) -> torch.Tensor:
    return x.new_zeros(*x.shape[:-1], width)  # [..., out]


@torch.library.impl("pocketvlm::stored_embedding", "cpu")  # type: ignore[misc,unused-ignore]
def _embedding(ids: torch.Tensor, index: int, width: int) -> torch.Tensor:
    return torch.zeros(*ids.shape, width)  # [1, N, D]


class StoredLinear(nn.Module):
    """Has a linear layer's shape; `index` says which one it is."""

    def __init__(self, index: int, width: int) -> None:
        super().__init__()
        self.index, self.width = index, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give zeros [..., out]: tracing asks for the shape only."""
        return torch.ops.pocketvlm.stored_linear(x, self.index, self.width)


class StoredEmbedding(StoredLinear):
    """Has an embedding table's shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give zeros [..., D]."""
        return torch.ops.pocketvlm.stored_embedding(x, self.index, self.width)


@dataclass(frozen=True)
class Skeleton:
    """A module without its matrices, in float32, and the layers they were taken from, with their names."""

    module: nn.Module
    layers: list[tuple[str, Any]]


def skeleton(module: nn.Module) -> Skeleton:
    """Copy a module without the matrices of its linear layers and of its token embedding.

    Args:
        module: what shall be converted; stays as it is.
    """
    layers, standing = matrices(module), {}
    for index, (_, layer) in enumerate(layers):
        kind = StoredLinear if isinstance(layer, nn.Linear) else StoredEmbedding
        standing[id(layer)] = kind(index, layer.out_features if kind is StoredLinear else layer.embedding_dim)
    return Skeleton(copy.deepcopy(module, standing).float().eval(), layers)


def matrices(module: nn.Module) -> list[tuple[str, Any]]:
    """The linear layers of a module, and its token embedding, with the names that their constants will have."""
    return [
        (name.replace(".", "_"), layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Embedding) and name == "table")
    ]


def in_blocks(layer: Any) -> bool:
    """Whether a layer's rows divide into blocks of int4; its matrix stays float16 otherwise."""
    return int(layer.weight.shape[1]) % BLOCK == 0


def register(
    checkpoint: Checkpoint,
    layers: list[tuple[str, Any]],
    storage: Callable[[str], str],
    inputs: LayerInputs | None,
) -> None:
    """Tell coremltools how to convert the layers that `skeleton` took out, from now on.

    Args:
        checkpoint: where their matrices are.
        layers: of the skeleton that is converted next.
        storage: a layer's name -> how its matrix is stored, a name of STORE; biases are float16.
        inputs: what the matrices are multiplied with; those of int4 are rounded for it.
    """
    mb, get_inputs, register_op = _frontend()

    def store(layer: Any, name: str) -> Any:
        kind, constant = storage(name), f"{name}_weight_to_fp16"
        release_pages(checkpoint)
        if kind == "int4" and inputs:
            return _int4(mb, layer.weight.detach(), constant, inputs.factor(layer.weight))
        return STORE[kind](mb, layer.weight.detach(), constant)

    def stored_linear(context: Any, node: Any) -> None:
        x, index, _ = get_inputs(context, node, expected=3)
        name, layer = layers[int(index.val)]
        x = mb.cast(x=x, dtype="fp16")
        bias = {} if layer.bias is None else {"bias": mb.const(val=_half(layer.bias), name=f"{name}_bias_to_fp16")}
        y = mb.linear(x=x, weight=store(layer, name), **bias)
        context.add(mb.cast(x=y, dtype="fp32", name=node.name))

    def stored_embedding(context: Any, node: Any) -> None:
        ids, index, _ = get_inputs(context, node, expected=3)
        name, layer = layers[int(index.val)]
        rows = mb.gather(x=store(layer, name), indices=mb.cast(x=ids, dtype="int32"))
        context.add(mb.cast(x=rows, dtype="fp32", name=node.name))

    register_op(stored_linear, torch_alias=["pocketvlm::stored_linear"], override=True)
    register_op(stored_embedding, torch_alias=["pocketvlm::stored_embedding"], override=True)


def _frontend() -> tuple[Any, Any, Any]:
    from coremltools.converters.mil import Builder, register_torch_op
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    return Builder, _get_inputs, register_torch_op


def _half(values: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.detach().to(torch.float16).numpy())


def _plain(mb: Any, matrix: torch.Tensor, name: str) -> Any:
    return mb.const(val=_half(matrix), name=name)


def _int8(mb: Any, matrix: torch.Tensor, name: str) -> Any:
    data, scale = to_bytes(matrix)
    return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=f"{name}_quantized")


def _int4(mb: Any, matrix: torch.Tensor, name: str, factor: np.ndarray | None = None) -> Any:
    if matrix.shape[1] % BLOCK:  # see in_blocks
        return _plain(mb, matrix, name)
    from coremltools.converters.mil.mil import types

    blocks = quantize_blocks(matrix.float().numpy(), INT4, factor)
    data = (blocks.codes.astype(np.int8) - INT4_ZERO).view(types.np_int4_dtype)
    scale = blocks.scales.astype(np.float16)  # exactly: they were chosen among float16's numbers
    return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=f"{name}_quantized")


def _palettized(mb: Any, matrix: torch.Tensor, name: str) -> Any:
    from coremltools.converters.mil.mil import types

    indices, palettes = to_palettes(matrix)
    data, lut = indices.view(types.np_uint4_dtype), palettes[:, None, :, None]  # [rows, columns], [groups, 1, 16, 1]
    return mb.constexpr_lut_to_dense(indices=data, lut=lut, name=f"{name}_palettized")


STORE: dict[str, Callable[[Any, torch.Tensor, str], Any]] = {
    "fp16": _plain,
    "int8": _int8,
    "int4": _int4,
    "pal4": _palettized,
}


def to_bytes(matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Round each row of a matrix to integers int8 [rows, columns] with a float16 scale [rows, 1]."""
    data, scales = np.empty(matrix.shape, np.int8), np.empty((len(matrix), 1), np.float16)
    step = max(1, _CACHED // matrix.shape[1])
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step].float().numpy()
        scale = (np.abs(rows).max(-1, keepdims=True) / 127).astype(np.float16)
        scale[scale == 0] = 1.0  # a row of zeros
        data[start : start + step] = np.clip(np.rint(rows / scale.astype(np.float32)), -127, 127)
        scales[start : start + step] = scale
    return data, scales


def to_palettes(matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Find the palettes of 16 values with the least squared error by Lloyd's algorithm (k-means in one dimension).

    Starts where the centres of a normal distribution would be if there were many: their density is the cube root of the
    values' (Panter and Dite 1951), a normal distribution sqrt(3) as wide. In one dimension the values that belong to a
    centre are a run of the sorted ones, so that a step needs only the runs' ends and sums.

    Args:
        matrix: [rows, columns].
    Returns:
        Indices uint8 [rows, columns] and palettes float16 [groups, 16]; a group is PALETTE_ROWS rows, or all of them
        where they do not divide.
    """
    groups = len(matrix) // PALETTE_ROWS if len(matrix) % PALETTE_ROWS == 0 else 1
    values = matrix.float().reshape(groups, -1).contiguous()  # [groups, n]
    ordered = torch.from_numpy(np.sort(values.numpy(), axis=-1))
    sums = nn.functional.pad(ordered.double().cumsum(-1), (1, 0))  # [groups, n + 1]
    n = values.shape[1]
    shares = (torch.arange(PALETTE, dtype=torch.float64) + 0.5) / PALETTE  # [16]
    deviation, mean = torch.std_mean(values.double(), -1, keepdim=True)  # [groups, 1]
    centres = mean + 3**0.5 * deviation * torch.special.ndtri(shares)  # [groups, 16]
    for _ in range(_LLOYD_STEPS):
        middles = (centres[:, 1:] + centres[:, :-1]) / 2  # [groups, 15]
        cuts = torch.searchsorted(ordered, middles.float())
        ends = nn.functional.pad(nn.functional.pad(cuts, (1, 0)), (0, 1), value=n)  # [groups, 17]
        counts = ends.diff(dim=-1)
        means = sums.gather(-1, ends).diff(dim=-1) / counts.clamp(min=1)
        centres = torch.where(counts > 0, means, centres)
    palettes = centres.half()
    middles = ((palettes[:, 1:].float() + palettes[:, :-1].float()) / 2).contiguous()
    indices = torch.searchsorted(middles, values)
    return indices.to(torch.uint8).reshape(matrix.shape).numpy(), palettes.numpy()
