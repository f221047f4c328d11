"""The frozen teacher in memory: what distillation reads of it, computed when it is asked for.

The attention of low layers and the projected vision tokens cost little; the answers' last hidden states need the whole
decoder, so they are kept per record after the first time.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from distill.dense_attention import DENSE, decoder_inputs
from distill.kept import Kept
from distill.merge import merge_vision, project
from distill.probe import Positions, attention_block, layer_index, read_attention
from distill.teacher.signals import Batch, Hidden

ANSWERS_KEPT = 4096  # records whose hidden states stay in the CPU's memory: 2 * D_T bytes an answer token


class Teacher:
    """Reads attention, vision tokens and answers of a teacher (distill.teacher.signals.TeacherSignals).

    Args:
        model: the teacher; frozen here.
        keep: how many records' answers to keep.
    """

    def __init__(self, model: LlavaForConditionalGeneration, keep: int = ANSWERS_KEPT) -> None:
        self.model = model.eval().requires_grad_(False)
        if not torch.cuda.is_available():
            self.model.model.language_model.set_attn_implementation(DENSE)
        self.kept = Kept(keep)
        self.last: tuple[Batch, Tensor] | None = None

    def keep_in(self, file: Path) -> None:
        """Keep answers in a file too, and read what an interrupted run left there."""
        self.kept = Kept(self.kept.entries, file)

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
        return self._projected(batch)

    @torch.no_grad()
    def attention(self, batch: Batch, layers: list[int], positions: Positions) -> list[Tensor]:
        """A_T of each layer: [B, H_T, M, V]; runs the decoder only up to the last of them."""
        decoder = self.model.model.language_model
        read = read_attention(decoder, layers, **decoder_inputs(batch, self._embeds(batch)))
        return [attention_block(read[layer_index(decoder, layer)], batch.visible, positions) for layer in layers]

    @torch.no_grad()
    def answers(self, batch: Batch, wanted: Tensor) -> Hidden:
        """Last hidden states at the positions `wanted`, bool [B, N], and the head that makes logits of them."""
        head = self.model.lm_head
        if len(batch.keys) != len(wanted):  # packed rows: which position belongs to which record is not told
            states = self._states(batch)[wanted]  # [A, D_T]
        else:
            if any(key not in self.kept for key in batch.keys):
                pairs = zip(batch.keys, self._states(batch), wanted, strict=True)
                fresh = {key: state[where].to("cpu", torch.float16) for key, state, where in pairs}  # [A_r, D_T] each
            else:
                fresh = {}
            known = {key: self.kept[key] if key in self.kept else fresh[key] for key in batch.keys}
            self.kept.add({key: value for key, value in fresh.items() if key not in self.kept})
            states = torch.cat([known[key].float() for key in batch.keys])  # [A, D_T]
        return Hidden(states.to(head.weight.device, self._dtype), head)

    @torch.no_grad()
    def says(self, batch: Batch, wanted: Tensor) -> Hidden:
        """`answers` of a batch that is no record's: nothing is kept of it."""
        return Hidden(self._states(batch)[wanted], self.model.lm_head)

    def switched(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Last hidden states [B, N, D_T] when given vision tokens [I, V, D_T] stand in the place of the teacher's own;
        with a gradient to them."""
        self._follow(batch)
        embeds = merge_vision(self.model, batch.input_ids, tokens)  # [B, N, D_T]
        states: Tensor = self.model.model.language_model(**decoder_inputs(batch, embeds)).last_hidden_state
        return states

    @property
    def _dtype(self) -> torch.dtype:
        """What the teacher computes in; the weights of a quantized one say less than its norm."""
        norm: Tensor = self.model.model.language_model.norm.weight
        return norm.dtype

    def _follow(self, batch: Batch) -> None:
        """Stand where the batch is: the teacher is nobody's module, so nobody else moves it."""
        if self.model.device != batch.features.device:
            self.model.to(batch.features.device)

    def _projected(self, batch: Batch) -> Tensor:
        """E_T, [I, V, D_T]; kept for the batch's other terms."""
        if self.last is None or self.last[0] is not batch:
            self._follow(batch)
            self.last = (batch, project(self.model, batch.features))
        return self.last[1]

    def _embeds(self, batch: Batch) -> Tensor:
        return merge_vision(self.model, batch.input_ids, self._projected(batch))  # [B, N, D_T]

    def _states(self, batch: Batch) -> Tensor:
        inputs = decoder_inputs(batch, self._embeds(batch))
        states: Tensor = self.model.model.language_model(**inputs).last_hidden_state  # [B, N, D_T]
        return states
