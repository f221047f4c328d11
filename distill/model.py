"""The module that is trained: a student, the throw-away adapters, and the loss L = L_sup + L_A + L_V + L_KL."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from distill.config import AttentionTerm, DistillConfig, LogitsTerm, VisionTerm
from distill.losses import attention as attention_losses
from distill.losses import logits as logits_losses
from distill.losses.vision import focus_scores, vision_mse
from distill.probe import Positions, attention_block, capture_attention_inputs, find_positions
from distill.teacher import Teacher, merge_vision
from vlm.data.collator import IGNORE

SUPERVISED = "sup"


class AlignKD(nn.Module):
    """Student plus adapters; `forward` returns the loss and each unweighted term.

    Args:
        student: its vision tower is frozen, projector and decoder train.
        teacher: None for plain supervised training.
        config: which terms, and their weights.
        tower: turns image references into the tower's patch features [I, P, vision_dim].
    """

    def __init__(
        self,
        student: LlavaForConditionalGeneration,
        teacher: Teacher | None,
        config: DistillConfig,
        tower: Callable[[list[str]], Tensor],
    ) -> None:
        super().__init__()
        student.model.vision_tower.requires_grad_(False)
        self.student = student
        self.recipe = config
        self.adapters = nn.ParameterDict()
        self._outside = {"teacher": teacher, "tower": tower}  # in a dict, so that nn.Module does not take them over
        text = student.config.text_config
        if teacher and config.attention:
            head_map = torch.randn(text.num_attention_heads, teacher.heads) / math.sqrt(teacher.heads)
            self.adapters["attention"] = nn.Parameter(head_map)  # P_attn, [H_S, H_T]
        if teacher and config.vision_tokens:
            bound = 1 / math.sqrt(teacher.width)
            self.adapters["vision"] = nn.Parameter(torch.empty(text.hidden_size, teacher.width).uniform_(-bound, bound))
            self.adapters["vision_bias"] = nn.Parameter(torch.zeros(text.hidden_size))  # P_V, [D_S, D_T] and [D_S]
        terms = {"attention": config.attention, "vision": config.vision_tokens, "logits": config.logits}
        self.terms = {name: term for name, term in terms.items() if term is not None}
        for name, term in self.terms.items():  # buffers, so that a resumed run goes on with the same automatic weights
            self.register_buffer(f"weight_{name}", torch.tensor(term.weight.fixed))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        images: list[str],
        keys: list[str],
        **_: object,
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        """Loss of one batch (vlm.data.collator.collate; labels already stand on the predicting position)."""
        features = self._outside["tower"](images)  # [I, P, vision_dim]
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        tokens = self.student.model.multi_modal_projector(features)  # E_S, [I, V, D]
        decoder = self.student.model.language_model
        layer = self.recipe.attention.student_layer if self.recipe.attention else 0
        with capture_attention_inputs(decoder, layer) as read:
            embeds = merge_vision(self.student, input_ids, tokens)  # [B, N, D]
            states = decoder(inputs_embeds=embeds, **inputs, use_cache=False).last_hidden_state  # [B, N, D]
        answers = labels != IGNORE
        logits = self.student.lm_head(states[answers]).float()  # [A, vocabulary]
        terms = {SUPERVISED: F.cross_entropy(logits, labels[answers])}
        teacher = self._outside["teacher"]
        if teacher is not None and self.terms:
            terms |= self._distillation_terms(teacher, features, tokens, read, input_ids, inputs, answers, logits, keys)
        weighted = [self.weight(name) * value for name, value in terms.items() if name != SUPERVISED]
        return {"loss": terms[SUPERVISED] + sum(weighted), "terms": terms}

    def _distillation_terms(
        self,
        teacher: Teacher,
        features: Tensor,
        tokens: Tensor,
        read: dict[str, Tensor],
        input_ids: Tensor,
        inputs: dict[str, Tensor],
        answers: Tensor,
        logits: Tensor,
        keys: list[str],
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        attention, vision, kl = self.recipe.attention, self.recipe.vision_tokens, self.recipe.logits
        teacher_tokens = teacher.vision_tokens(features)  # E_T, [I, V, D_T]

        def teacher_inputs() -> dict[str, Tensor]:
            return {"inputs_embeds": teacher.embed(input_ids, teacher_tokens), **inputs}

        if attention or (vision and vision.focus_weight):
            image_id = self.student.config.image_token_id
            positions = find_positions(input_ids, inputs["attention_mask"], image_id)
            teacher_layer = attention.teacher_layer if attention else 0
            block = teacher.attention(teacher_layer, teacher_inputs(), positions)  # A_T, [B, H_T, M, V]
            if attention:
                terms["attention"] = self._attention_term(attention, block, read, inputs["attention_mask"], positions)
            if vision:
                terms["vision"] = self._vision_term(vision, teacher_tokens, tokens, block, positions)
        elif vision:
            terms["vision"] = self._vision_term(vision, teacher_tokens, tokens, None, None)
        if kl:
            terms["logits"] = self._logits_term(kl, teacher.answer_logits(keys, answers, teacher_inputs), logits)
        return terms

    def _attention_term(
        self, term: AttentionTerm, teacher: Tensor, read: dict[str, Tensor], mask: Tensor, positions: Positions
    ) -> Tensor:
        layer = self.student.model.language_model.layers[term.student_layer]
        student = attention_block(layer.self_attn, read["hidden"], read["rotary"], mask, positions)  # A_S, [B, H_S, M, V]
        distance = attention_losses.DISTANCES[term.distance]
        return distance(teacher, student, self.adapters["attention"], positions.text_mask)

    def _vision_term(
        self, term: VisionTerm, teacher: Tensor, student: Tensor, block: Tensor | None, positions: Positions | None
    ) -> Tensor:
        mapped = F.linear(teacher, self.adapters["vision"], self.adapters["vision_bias"])  # P_V(E_T), [I, V, D_S]
        present = torch.ones(mapped.shape[:2], dtype=torch.bool, device=mapped.device)  # [I, V]
        if block is None or positions is None:
            scores = torch.zeros(mapped.shape[:2], device=mapped.device)
        else:  # vision columns of the batch, in order, are the images' tokens, in order
            scores = focus_scores(block, positions.text_mask)[positions.vision_mask].view(mapped.shape[:2])  # [I, V]
        return vision_mse(mapped, student, scores, term.focus_tokens, term.focus_weight, present)

    def _logits_term(self, term: LogitsTerm, teacher: Tensor, student: Tensor) -> Tensor:
        return logits_losses.DISTANCES[term.distance](teacher, student, term.temperature)

    def weight(self, name: str) -> Tensor:
        """Outer weight of a term, a scalar buffer."""
        return self.get_buffer(f"weight_{name}")

    def student_parameters(self) -> list[nn.Parameter]:
        """Parameters of the student that train (gradient norms of the terms are taken on these)."""
        return [p for p in self.student.parameters() if p.requires_grad]
