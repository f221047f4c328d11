"""Reading inside a decoder without paying for it: a block of one layer's attention, some queries x some keys only.

Every layer keeps running its own fused attention. The wanted layer's queries and keys are taken where that attention
is called, after projections, norms and rotary embedding, whatever the architecture makes of them, and the block is
computed beside it (tests/test_probe.py: equal to eager attention).
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill.precision import wide_dtype
from distill.terms import Block
from vlm.errors import UserError

RECORDING = "recording"  # name of the attention function that also keeps what it is called with
CHUNK = 2**23  # scores computed at a time: 32 MB in float32
ROWS = 64  # rows computed at a time: of many short turns in one row, the fewer together, the fewer keys are seen


@dataclass(frozen=True)
class Positions:
    """Which query rows and key columns of each sample make up a block, padded to the longest sample.

    Attributes:
        rows: positions of the queries, [B, M]; row_mask: bool, False for padding.
        columns: positions of the keys, [B, V]; column_mask: bool, False for padding.
    """

    rows: Tensor
    row_mask: Tensor
    columns: Tensor
    column_mask: Tensor

    @property
    def empty(self) -> bool:
        """True when no sample has anything in the block."""
        return self.rows.shape[1] == 0 or self.columns.shape[1] == 0


@dataclass(frozen=True)
class Read:
    """What a layer's attention was called with.

    Attributes:
        query: [B, H, N, d], key: [B, KV, N, d], both after norms and rotary embedding.
        scaling: factor on their product; softcap: c of c * tanh(score / c), or None.
        window: how many positions back a query sees where no mask says otherwise, or None.
    """

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    window: int | None


def find_positions(
    input_ids: Tensor, segments: Tensor, visible: Tensor | None, image_token_id: int, block: Block = "text_vision"
) -> Positions:
    """Find rows and columns from where the image tokens really are.

    Args:
        input_ids: [B, N].
        segments: [B, N], negative where there is padding.
        visible: bool [B, 1, N, N], True where a query may see a key; None: every earlier position.
        image_token_id: the placeholder.
        block: which queries x which keys; text_vision and vision_text have the text that can see an image.
    """
    real = segments >= 0  # [B, N]
    is_vision = (input_ids == image_token_id) & real
    text = real & ~is_vision
    if block in ("text_vision", "vision_text"):
        seen = is_vision.cumsum(-1) > 0  # [B, N]
        if visible is not None:
            seen = (visible[:, 0] & is_vision[:, None, :]).any(-1)
        rows, columns = (text & seen, is_vision) if block == "text_vision" else (is_vision, text & seen)
    elif block == "vision_vision":
        rows = columns = is_vision
    else:
        rows = columns = text if block == "text_text" else real
    return Positions(*_pack(rows), *_pack(columns))


def own_columns(records: Tensor | None, where: Positions) -> Tensor:
    """Which columns of a block are of a row's own record, bool [B, 1, V], or [B, M, V] with several records in a row.

    Args:
        records: which record each position belongs to, int64 [B, N]; None: a row of the batch is one record.
        where: the block.
    """
    real = where.column_mask[:, None]  # [B, 1, V]
    if records is None or where.empty or not bool((records > 0).any()):
        return real
    return real & (records.gather(1, where.rows)[..., None] == records.gather(1, where.columns)[:, None])


def _pack(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the True entries of each row, in order, padded with 0: bool [B, N] -> [B, K], bool [B, K]."""
    count = int(wanted.sum(-1).max())
    order = torch.argsort((~wanted).to(torch.int8), dim=-1, stable=True)[:, :count]  # [B, K]
    mask = wanted.gather(1, order)
    return order * mask, mask


def attention_block(read: Read, visible: Tensor | None, positions: Positions) -> Tensor:
    """Attention probabilities of the block's rows over its columns, in float32 at least.

    The softmax runs over all keys a row may see, but never for all rows at once: rows go in chunks, recomputed in the
    backward pass, so that beside the block itself nothing of size [.., M, N] is kept.

    Args:
        read: the layer's queries and keys.
        visible: bool [B, 1, N, N] or None, as in `find_positions`.
        positions: which rows and columns.
    Returns:
        A, [B, H, M, V]; rows and columns that are padding are zero.
    """
    batch, heads, length, size = read.query.shape
    where = positions.rows[:, None, :, None]  # [B, 1, M, 1]
    query = read.query.gather(2, where.expand(-1, heads, -1, size))  # [B, H, M, d]
    if positions.empty:
        empty = query.new_zeros(batch, heads, positions.rows.shape[1], positions.columns.shape[1])
        return empty.to(wide_dtype(query.dtype)) + query.sum()
    rows_at_once = max(1, min(ROWS, CHUNK // (batch * heads * length)))
    parts = []
    for index in range(0, query.shape[2], rows_at_once):
        part = slice(index, index + rows_at_once)
        mask = _visible_rows(visible, positions.rows[:, part], length, read.window)  # [B, m, N]
        arguments = (query[:, :, part], read.key, *_only_seen(mask, positions.columns), read)
        parts.append(checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
    block = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]  # [B, H, M, V]
    return block * (positions.row_mask[:, None, :, None] & positions.column_mask[:, None, None, :])


def _only_seen(visible: Tensor, columns: Tensor) -> tuple[Tensor | slice, Tensor, Tensor]:
    """Leave out the keys that no row of a chunk may see (later ones, the other turns, other records of a packed row).

    Args:
        visible: bool [B, m, N]; columns: [B, V], kept whether seen or not.
    Returns:
        Indices of the K keys kept, [K]; visible [B, m, K]; and columns [B, V] as indices into the keys kept. The first
        K keys, the usual ones, are a slice: it copies nothing.
    """
    kept = visible.any(1).any(0)  # [N]
    kept[columns] = True
    indices = kept.nonzero()[:, 0]  # [K]
    seen = slice(len(indices)) if int(indices[-1]) < len(indices) else indices
    return seen, visible[:, :, seen], (kept.cumsum(0) - 1)[columns]


def _chunk(query: Tensor, key: Tensor, seen: Tensor | slice, visible: Tensor, columns: Tensor, read: Read) -> Tensor:
    """Block of some rows: query [B, H, m, d], key [B, KV, N, d] of which only [K] are seen, visible bool [B, m, K],
    columns [B, V]."""
    key = key[:, :, seen]  # [B, KV, K, d]; here, so that no chunk's copy is kept for the backward pass
    batch, heads, count, size = query.shape
    shared = key.shape[1]
    dtype = wide_dtype(query.dtype)
    with torch.autocast(query.device.type, enabled=False):  # autocast would make the scores bfloat16
        grouped = query.to(dtype).reshape(batch, shared, heads // shared * count, size)  # [B, KV, H/KV*m, d]
        scores = grouped @ key.to(dtype).transpose(-1, -2) * read.scaling  # [B, KV, H/KV*m, K]
    scores = scores.view(batch, heads, count, -1)  # [B, H, m, K]
    if read.softcap is not None:
        scores = torch.tanh(scores / read.softcap) * read.softcap
    scores = scores.masked_fill(~visible[:, None], torch.finfo(dtype).min)
    total = scores.logsumexp(-1, keepdim=True)  # [B, H, m, 1]
    wanted = columns[:, None, None, :].expand(-1, heads, count, -1)  # [B, H, m, V]
    return (scores.gather(3, wanted) - total).exp()


def _visible_rows(visible: Tensor | None, rows: Tensor, length: int, window: int | None) -> Tensor:
    """Which keys each of the rows [B, m] may see, bool [B, m, N]."""
    if visible is not None:
        return visible[:, 0].gather(1, rows[..., None].expand(-1, -1, length))
    behind = rows[..., None] - torch.arange(length, device=rows.device)  # [B, m, N]
    return (behind >= 0) & (behind < (window or length))


def layer_index(decoder: PreTrainedModel, layer: int) -> int:
    """A layer's index from 0; negative numbers count from the last, -1."""
    return layer % len(decoder.layers)


class _Enough(Exception):
    """Raised inside a forward pass when everything wanted was read."""


@contextmanager
def reading_attention(decoder: PreTrainedModel, layers: list[int], *, stop: bool = False) -> Iterator[dict[int, Read]]:
    """While the block runs, keep what the attention of `layers` is called with.

    Args:
        decoder: the decoder whose forward pass the block runs.
        layers: their indices; negative ones count from the last.
        stop: leave the block as soon as all are kept.
    Raises:
        UserError: gradient checkpointing of the reentrant kind hides the layer from the gradient.
    """
    found: dict[int, Read] = {}
    wanted = {layer_index(decoder, layer) for layer in layers}
    modules = {index: decoder.layers[index].self_attn for index in wanted}
    gradient = torch.is_grad_enabled()
    for index, module in modules.items():

        def keep(read: Read, index: int = index) -> None:
            if gradient and not torch.is_grad_enabled():
                raise UserError(
                    "gradient checkpointing: the reentrant kind was found, which hides attention from the gradient. "
                    "Set use_reentrant to false."
                )
            found[index] = read
            if stop and len(found) == len(wanted):
                raise _Enough

        # Only this layer's own copy of the configuration names the recording function: the others, the mask and a
        # recomputation of this layer in the backward pass see what they always see. The field is transformers' own: its
        # setter would also change the configurations within this one, which the copy shares with the model's.
        module.plain_config, module.keep = module.config, keep
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = RECORDING
    try:
        yield found
    except _Enough:
        pass
    finally:
        for module in modules.values():
            module.config = module.plain_config
            del module.plain_config, module.keep


def _recording_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The layer's own attention function, after keeping queries and keys; transformers' attention interface."""
    layer: Any = module
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    layer.keep(Read(query, key, scaling, kwargs.get("softcap"), kwargs.get("sliding_window")))
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    recording, layer.config = layer.config, layer.plain_config  # FlashAttention's function reads its own name there
    try:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(layer.config._attn_implementation, eager)
        output: tuple[Tensor, Tensor | None] = function(module, query, key, value, attention_mask, **kwargs)
    finally:
        layer.config = recording
    return output


@torch.no_grad()
def read_attention(decoder: PreTrainedModel, layers: list[int], **inputs: Any) -> dict[int, Read]:
    """Run `decoder` only as far as the last of `layers` and return what their attention was called with."""
    with reading_attention(decoder, layers, stop=True) as found:
        decoder(**inputs)
    return found


AttentionInterface.register(RECORDING, _recording_attention)
