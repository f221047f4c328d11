"""Reading inside a decoder without paying for it: one layer's attention, text-query rows x vision-key columns only.

Every layer of the model keeps running fused attention; the wanted block is computed beside it from that layer's own
queries and keys (tests/test_probe.py: equal to eager attention).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass(frozen=True)
class Positions:
    """Where a batch's text rows and vision columns are, padded to the longest sample.

    Attributes:
        text: indices of text positions that can see a vision token, [B, M]; text_mask: bool, False for padding.
        vision: indices of vision tokens, [B, V]; vision_mask: bool, False for padding (text-only samples have none).
    """

    text: Tensor
    text_mask: Tensor
    vision: Tensor
    vision_mask: Tensor


def find_positions(input_ids: Tensor, attention_mask: Tensor, image_token_id: int) -> Positions:
    """Find rows and columns from where the image tokens really are.

    Args:
        input_ids: [B, N].
        attention_mask: bool [B, 1, N, N], True where a query may see a key.
        image_token_id: the placeholder.
    """
    is_vision = input_ids == image_token_id  # [B, N]
    sees_vision = (attention_mask[:, 0] & is_vision[:, None, :]).any(-1)  # [B, N]
    text, text_mask = _pack(sees_vision & ~is_vision)
    vision, vision_mask = _pack(is_vision)
    return Positions(text, text_mask, vision, vision_mask)


def _pack(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the True entries of each row, in order, padded with 0: bool [B, N] -> [B, K], bool [B, K]."""
    count = int(wanted.sum(-1).max())
    order = torch.argsort((~wanted).to(torch.int8), dim=-1, stable=True)[:, :count]  # [B, K]
    mask = wanted.gather(1, order)
    return order * mask, mask


def attention_block(
    attention: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, positions: Positions
) -> Tensor:
    """Attention probabilities of text rows over vision columns.

    Args:
        attention: the layer's self-attention: a module with q_proj, k_proj and head_dim.
        hidden: what the layer's self-attention reads (after its input norm), [B, N, D].
        rotary: cosines and sines of the positions, each [B, N, d].
        mask: bool [B, 1, N, N].
        positions: which rows and columns.
    Returns:
        A, [B, H, M, V]; rows and columns that are padding are zero.
    """
    batch, length, _ = hidden.shape
    size = attention.head_dim
    rows = positions.text[..., None]  # [B, M, 1]
    q = attention.q_proj(hidden.gather(1, rows.expand(-1, -1, hidden.shape[-1])))  # [B, M, H*d]
    k = attention.k_proj(hidden)  # [B, N, KV*d]
    q = q.view(batch, -1, q.shape[-1] // size, size).transpose(1, 2)  # [B, H, M, d]
    k = k.view(batch, length, -1, size).transpose(1, 2)  # [B, KV, N, d]
    cos, sin = rotary
    q, _ = apply_rotary_pos_emb(q, q, *(x.gather(1, rows.expand(-1, -1, size)) for x in (cos, sin)))
    k, _ = apply_rotary_pos_emb(k, k, cos, sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, H, N, d]
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would make the scores bfloat16
        scores = q.float() @ k.float().transpose(-1, -2) * size**-0.5  # [B, H, M, N]
    visible = mask[:, 0].gather(1, rows.expand(-1, -1, length))  # [B, M, N]
    scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1)  # [B, H, M, N]
    columns = positions.vision[:, None, None, :].expand(-1, q.shape[1], q.shape[2], -1)  # [B, H, M, V]
    block = probabilities.gather(3, columns)
    return block * (positions.text_mask[:, None, :, None] & positions.vision_mask[:, None, None, :])


class _Enough(Exception):
    """Raised inside a forward pass when everything wanted was captured."""


@contextmanager
def capture_attention_inputs(decoder: PreTrainedModel, layer: int, *, stop: bool = False) -> Iterator[dict[str, Any]]:
    """While the block runs, keep what self-attention of `layer` was called with: `hidden` and `rotary`.

    Args:
        decoder: the decoder whose forward pass the block runs.
        layer: index of the layer, from 0.
        stop: leave the block as soon as they are kept.
    """
    captured: dict[str, Any] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured["hidden"] = args[0] if args else kwargs["hidden_states"]
        captured["rotary"] = kwargs["position_embeddings"]
        if stop:
            raise _Enough

    handle = decoder.layers[layer].self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield captured
    except _Enough:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def read_attention_inputs(decoder: PreTrainedModel, layer: int, **inputs: Any) -> dict[str, Any]:
    """Run `decoder` only as far as the self-attention of `layer` and return what that was called with."""
    with capture_attention_inputs(decoder, layer, stop=True) as captured:
        decoder(**inputs)
    return captured
