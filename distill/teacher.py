"""The frozen teacher: what distillation reads of it.

The attention block of a low layer and the projected vision tokens cost little and are computed live; the answer
tokens' last hidden states need the whole decoder, so they are kept per record after the first time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from distill.probe import Positions, attention_block, read_attention_inputs
from distill.rows import Key

ANSWERS_KEPT = 4096  # records whose hidden states stay in the CPU's memory: 2 * D_T bytes an answer token


class Teacher:
    """Reads attention, vision tokens and answer logits of a teacher.

    Args:
        model: the teacher; frozen here.
        keep: how many records' answers to keep.
    """

    def __init__(self, model: LlavaForConditionalGeneration, keep: int = ANSWERS_KEPT) -> None:
        self.model = model.eval().requires_grad_(False)
        self.keep = keep
        self.kept: dict[Key, Tensor] = {}  # [A, D_T] float16 of a record

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
    def answer_logits(self, keys: list[Key], answers: Tensor, inputs: Callable[[], dict[str, Tensor]]) -> Tensor:
        """Logits at the label positions of the batch, in order.

        Args:
            keys: one per sample.
            answers: bool [B, N], the label positions.
            inputs: gives the decoder's inputs, called only if a sample's answers are not kept.
        Returns:
            [A, vocabulary], float32.
        """
        known = self.kept
        if any(key not in known for key in keys):
            states = self.model.model.language_model(**inputs(), use_cache=False).last_hidden_state  # [B, N, D_T]
            pairs = zip(states, answers, strict=True)
            fresh = [state[wanted].to("cpu", torch.float16) for state, wanted in pairs]  # B times [A, D_T]
            computed = {key: hidden for key, hidden in zip(keys, fresh, strict=True) if key not in self.kept}
            known = {**self.kept, **computed}
            self.kept.update(list(computed.items())[: max(0, self.keep - len(self.kept))])
        weight = self.model.lm_head.weight
        hidden = torch.cat([known[key].float() for key in keys]).to(weight.device, weight.dtype)  # [A, D_T]
        logits: Tensor = self.model.lm_head(hidden)
        return logits.float()


def merge_vision(model: LlavaForConditionalGeneration, input_ids: Tensor, tokens: Tensor) -> Tensor:
    """Embed ids [B, N] and put vision tokens [I, V, D] where the image placeholders stand: [B, N, D]."""
    is_vision = input_ids == model.config.image_token_id  # [B, N]
    embeds = model.get_input_embeddings()(input_ids.masked_fill(is_vision, 0))
    return embeds.masked_scatter(is_vision[..., None], tokens.to(embeds.dtype))
