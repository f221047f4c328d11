"""The frozen teacher: what distillation reads of it, computed once per record and kept.

The attention block of a low layer and the projected vision tokens cost little and are computed live; the answer
tokens' last hidden states need the whole decoder, so they are kept per record (float16) after the first time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from distill.probe import Positions, attention_block, read_attention_inputs


class Teacher:
    """Reads attention, vision tokens and answer logits of a teacher; holds its caches."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.model = model.eval().requires_grad_(False)
        self.hidden: dict[str, Tensor] = {}  # record key -> [A, D_T] float16

    @property
    def heads(self) -> int:
        """Attention heads of the decoder."""
        return int(self.model.config.text_config.num_attention_heads)

    @property
    def width(self) -> int:
        """Hidden size of the decoder, D_T."""
        return int(self.model.config.text_config.hidden_size)

    @torch.no_grad()
    def vision_tokens(self, features: Tensor) -> Tensor:
        """Project the shared tower's features [I, P, vision_dim] to E_T, [I, V, D_T]."""
        tokens: Tensor = self.model.model.multi_modal_projector(features)
        return tokens

    @torch.no_grad()
    def attention(self, layer: int, inputs: dict[str, Tensor], visible: Tensor, positions: Positions) -> Tensor:
        """A_T of `layer`: [B, H_T, M, V]; runs the decoder only up to that layer. `visible` is bool [B, 1, N, N]."""
        decoder = self.model.model.language_model
        read = read_attention_inputs(decoder, layer, **inputs, use_cache=False)
        attention = decoder.layers[layer].self_attn
        return attention_block(attention, read["hidden"], read["rotary"], visible, positions)

    @torch.no_grad()
    def answer_logits(self, keys: list[str], answers: Tensor, inputs: Callable[[], dict[str, Tensor]]) -> Tensor:
        """Logits at the label positions of the batch, in order.

        Args:
            keys: one per sample; a sample whose key was seen before is not computed again.
            answers: bool [B, N], the label positions.
            inputs: gives the decoder's inputs, called only if a sample is new.
        Returns:
            [A, vocabulary], float32.
        """
        if any(key not in self.hidden for key in keys):
            states = self.model.model.language_model(**inputs(), use_cache=False).last_hidden_state  # [B, N, D_T]
            for key, state, wanted in zip(keys, states, answers, strict=True):
                self.hidden[key] = state[wanted].to(torch.float16)
        hidden = torch.cat([self.hidden[key].float() for key in keys])  # [A, D_T]
        logits: Tensor = self.model.lm_head(hidden.to(self.model.lm_head.weight.dtype))
        return logits.float()


def merge_vision(model: LlavaForConditionalGeneration, input_ids: Tensor, tokens: Tensor) -> Tensor:
    """Embed ids [B, N] and put vision tokens [I, V, D] where the image placeholders stand: [B, N, D]."""
    is_vision = input_ids == model.config.image_token_id  # [B, N]
    embeds = model.get_input_embeddings()(input_ids.masked_fill(is_vision, 0))
    return embeds.masked_scatter(is_vision[..., None], tokens.to(embeds.dtype))
