"""The frozen teacher: what distillation reads of it.

The attention block of a low layer and the projected vision tokens cost little and are computed live; the answer
tokens' last hidden states need the whole decoder, so they are kept per record after the first time.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from distill.attention import DENSE, decoder_inputs
from distill.merge import merge_vision, project
from distill.probe import Positions, attention_block, layer_index, read_attention
from distill.rows import Key
from distill.signals import Batch, Hidden

ANSWERS_KEPT = 4096  # records whose hidden states stay in the CPU's memory: 2 * D_T bytes an answer token


class Teacher:
    """Reads attention, vision tokens and answers of a teacher; the live one of `distill.signals.TeacherSignals`.

    Args:
        model: the teacher; frozen here.
        keep: how many records' answers to keep.
    """

    def __init__(self, model: LlavaForConditionalGeneration, keep: int = ANSWERS_KEPT) -> None:
        self.model = model.eval().requires_grad_(False)
        if not torch.cuda.is_available():
            self.model.model.language_model.set_attn_implementation(DENSE)
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
    def vision_tokens(self, batch: Batch) -> Tensor:
        """Project the shared tower's features to E_T, [I, V, D_T]."""
        self.model.to(batch.features.device)  # no module of the one that is trained, so that nobody else moves it
        return project(self.model, batch.features)

    @torch.no_grad()
    def attention(self, batch: Batch, layers: list[int], positions: Positions) -> list[Tensor]:
        """A_T of each layer, [B, H_T, M, V]; runs the decoder only up to the last of them."""
        decoder = self.model.model.language_model
        read = read_attention(decoder, layers, **self._inputs(batch))
        return [attention_block(read[layer_index(decoder, layer)], batch.visible, positions) for layer in layers]

    @torch.no_grad()
    def answers(self, batch: Batch, wanted: Tensor) -> Hidden:
        """Last hidden states at the positions `wanted`, bool [B, N], in order: [A, D_T], and the head."""
        known = self.kept
        if any(key not in known for key in batch.keys):
            states = self.model.model.language_model(**self._inputs(batch)).last_hidden_state  # [B, N, D_T]
            pairs = zip(states, wanted, strict=True)
            fresh = [state[here].to("cpu", torch.float16) for state, here in pairs]  # B times [A, D_T]
            computed = {key: hidden for key, hidden in zip(batch.keys, fresh, strict=True) if key not in self.kept}
            known = {**self.kept, **computed}
            self.kept.update(list(computed.items())[: max(0, self.keep - len(self.kept))])
        weight = self.model.lm_head.weight
        hidden = torch.cat([known[key].float() for key in batch.keys]).to(weight.device, weight.dtype)  # [A, D_T]
        return Hidden(hidden, self.model.lm_head)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return decoder_inputs(batch, merge_vision(self.model, batch.input_ids, self.vision_tokens(batch)))
