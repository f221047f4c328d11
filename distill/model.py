"""The module that is trained: a student, the throw-away adapters, and the loss L = L_sup + L_A + L_V + L_KL."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from distill.attention import DENSE, additive_mask
from distill.config import DistillConfig
from distill.losses import attention as attention_losses
from distill.losses import logits as logits_losses
from distill.losses.vision import focus_scores, vision_mse
from distill.probe import Positions, attention_block, capture_attention_inputs, find_positions
from distill.rows import Key
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
        if not torch.cuda.is_available():
            for model in (student, *([teacher.model] if teacher else [])):
                model.model.language_model.set_attn_implementation(DENSE)
        self.student = student
        self.recipe = config
        self.adapters = nn.ParameterDict()
        self.teacher, self.tower = teacher, tower  # no modules: they are neither trained nor saved
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
        keys: list[Key],
        **_: object,
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        """Loss of one batch (vlm.data.collator.collate; labels already stand on the predicting position)."""
        features = self.tower(images)  # [I, P, vision_dim]
        inputs = {"attention_mask": additive_mask(attention_mask), "position_ids": position_ids}
        tokens = self.student.model.multi_modal_projector(features)  # E_S, [I, V, D]
        decoder = self.student.model.language_model
        layer = self.recipe.attention.student_layer if self.recipe.attention else 0
        with capture_attention_inputs(decoder, layer) as read:
            embeds = merge_vision(self.student, input_ids, tokens)  # [B, N, D]
            states = decoder(inputs_embeds=embeds, **inputs, use_cache=False).last_hidden_state  # [B, N, D]
        answers = labels != IGNORE
        logits = self.student.lm_head(states[answers]).float()  # [A, vocabulary]
        terms = {SUPERVISED: F.cross_entropy(logits, labels[answers])}
        if self.teacher is not None and self.terms:
            positions = find_positions(input_ids, attention_mask, self.student.config.image_token_id)
            seen = self._read_teacher(
                self.teacher, features, input_ids, inputs, attention_mask, positions, answers, keys
            )
            if self.recipe.attention:
                attention = decoder.layers[layer].self_attn
                block = attention_block(attention, read["hidden"], read["rotary"], attention_mask, seen["positions"])
                seen["student_attention"] = block  # A_S, [B, H_S, M, V]
            with torch.autocast(features.device.type, enabled=False):
                terms |= self._terms(seen, tokens.float(), logits)
        weighted = [self.weight(name).clone() * value for name, value in terms.items() if name != SUPERVISED]
        return {"loss": terms[SUPERVISED] + sum(weighted), "terms": terms}

    def _read_teacher(
        self,
        teacher: Teacher,
        features: Tensor,
        input_ids: Tensor,
        inputs: dict[str, Tensor],
        visible: Tensor,
        positions: Positions,
        answers: Tensor,
        keys: list[Key],
    ) -> dict[str, Any]:
        """What the terms need of the teacher: its vision tokens, attention block and answer logits."""
        teacher.model.to(features.device)  # no module of this one, so that nobody else moves it
        attention, vision = self.recipe.attention, self.recipe.vision_tokens
        tokens = teacher.vision_tokens(features)  # E_T, [I, V, D_T]

        def teacher_inputs() -> dict[str, Tensor]:
            return {"inputs_embeds": merge_vision(teacher.model, input_ids, tokens), **inputs}

        seen: dict[str, Any] = {"tokens": tokens.float(), "positions": positions}
        if attention or (vision and vision.focus_weight):
            layer = attention.teacher_layer if attention else 0
            seen["attention"] = teacher.attention(layer, teacher_inputs(), visible, positions)  # A_T, [B, H_T, M, V]
        if self.recipe.logits:
            seen["logits"] = teacher.answer_logits(keys, answers, teacher_inputs)
        return seen

    def _terms(self, seen: dict[str, Any], tokens: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """The unweighted terms, in float32, from what was read of the teacher and the student's tokens and logits."""
        attention, vision, kl = self.recipe.attention, self.recipe.vision_tokens, self.recipe.logits
        terms: dict[str, Tensor] = {}
        if attention:
            distance = attention_losses.DISTANCES[attention.distance]
            rows = seen["positions"].text_mask
            terms["attention"] = distance(
                seen["attention"], seen["student_attention"], self.adapters["attention"], rows
            )
        if vision:
            mapped = F.linear(
                seen["tokens"], self.adapters["vision"], self.adapters["vision_bias"]
            )  # P_V(E_T), [I, V, D_S]
            scores = torch.zeros(mapped.shape[:2], device=mapped.device)  # [I, V]
            if vision.focus_weight:  # the batch's vision columns, in order, are the images' tokens, in order
                where = seen["positions"]
                scores = focus_scores(seen["attention"], where.text_mask)[where.vision_mask].view(mapped.shape[:2])
            terms["vision"] = vision_mse(mapped, tokens, scores, vision.focus_tokens, vision.focus_weight)
        if kl:
            terms["logits"] = logits_losses.DISTANCES[kl.distance](seen["logits"], logits, kl.temperature)
        return terms

    def weight(self, name: str) -> Tensor:
        """Outer weight of a term, a scalar buffer."""
        return self.get_buffer(f"weight_{name}")

    def student_parameters(self) -> list[nn.Parameter]:
        """Parameters of the student that train (gradient norms of the terms are taken on these)."""
        return [p for p in self.student.parameters() if p.requires_grad]
