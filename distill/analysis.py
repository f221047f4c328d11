"""What goes on inside a decoder, layer by layer: Figure 2 of Align-KD's paper, and where text looks in the picture.

The paper chose the first layer because there vision and text features differ most, and adjacent later layers hardly
change their features; its figure is drawn from the numbers below. All functions are of tensors of one prompt.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from distill.probe import attention_block, find_positions, reading_attention
from vlm.errors import UserError


@dataclass(frozen=True)
class Insides:
    """One prompt's way through a decoder of L layers.

    Attributes:
        states: what the first layer reads and what each layer leaves, before any final norm, [L + 1, N, D].
        attention: probabilities of one layer, text rows that see the picture x vision columns, [H, M, V].
        vision: True where a vision token is, bool [N].
    """

    states: Tensor
    attention: Tensor
    vision: Tensor


@torch.no_grad()
def look_inside(decoder: PreTrainedModel, embeds: Tensor, ids: Tensor, image_token_id: int, layer: int = 0) -> Insides:
    """Run a decoder over one prompt with one picture, its own attention unchanged.

    Args:
        decoder: any with `layers` that transformers runs.
        embeds: the prompt, vision tokens in their places, [1, N, D].
        ids: its ids with the placeholder at the vision tokens, [1, N].
        image_token_id: the placeholder.
        layer: whose attention is kept; negative ones count from the last.
    Raises:
        UserError: there is no such layer.
    """
    count = len(decoder.layers)
    if not -count <= layer < count:
        raise UserError(f"layer {layer}: the decoder has {count} layers. Give a number from 0 to {count - 1}.")
    states: list[Tensor] = []

    def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def keep_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [decoder.layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    hooks += [module.register_forward_hook(keep_output) for module in decoder.layers]
    try:
        with reading_attention(decoder, [layer]) as read:
            decoder(inputs_embeds=embeds, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    positions = find_positions(ids, torch.zeros_like(ids), None, image_token_id)
    (kept,) = read.values()
    block = attention_block(kept, None, positions)  # [1, H, M, V]
    return Insides(torch.cat(states).float(), block[0].float(), ids[0] == image_token_id)


def adjacent_similarity(states: Tensor, wanted: Tensor) -> Tensor:
    """How little each layer changes its input: mean over positions of cos(h_l, h_l+1).

    Args:
        states: [L + 1, N, D].
        wanted: which positions, bool [N].
    Returns:
        [L].
    """
    kept = states[:, wanted]  # [L + 1, n, D]
    return F.cosine_similarity(kept[:-1], kept[1:], dim=-1).mean(-1)  # [L]


def cross_similarity(states: Tensor, vision: Tensor) -> Tensor:
    """How alike the two modalities are after each layer: mean cosine of all pairs of a vision and a text position.

    Args:
        states: [L + 1, N, D].
        vision: True where a vision token is, bool [N].
    Returns:
        [L + 1], the first before any layer.
    """
    directions = F.normalize(states, dim=-1)  # [L + 1, N, D]
    # The mean of all pairs' products is the product of the means.
    return (directions[:, vision].mean(1) * directions[:, ~vision].mean(1)).sum(-1)  # [L + 1]


def attention_map(attention: Tensor) -> Tensor:
    """Where the text looks: attention on each vision token, mean over heads and text rows, as the picture's grid.

    Args:
        attention: [H, M, V], V a square number.
    Returns:
        [G, G] with G * G = V, rows from the top of the picture.
    Raises:
        UserError: V is no square number.
    """
    count = attention.shape[-1]
    grid = round(count**0.5)
    if grid * grid != count:
        raise UserError(f"{count} vision tokens are no square grid: no map of the picture can be drawn from them.")
    return attention.mean((0, 1)).view(grid, grid)


def looking_share(attention: Tensor) -> Tensor:
    """Share of its attention that each head spends on the picture, mean over text rows: [H, M, V] -> [H]."""
    return attention.sum(-1).mean(-1)
