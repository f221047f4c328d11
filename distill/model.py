"""The module that is trained: a student, the throw-away adapters, and the loss L = L_sup + L_A + L_V + L_KL."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from distill.config import DistillConfig
from distill.data.rows import Key
from distill.dense_attention import DENSE, decoder_inputs
from distill.features import TowerFeatures
from distill.losses import attention as attention_losses
from distill.losses import logits as logits_losses
from distill.losses.answers import Divergence, answer_losses
from distill.losses.vision import focus_scores, vision_mse
from distill.merge import merge_vision, project
from distill.precision import wide
from distill.probe import Positions, Read, attention_block, find_positions, layer_index, own_columns, reading_attention
from distill.teacher.signals import Batch, TeacherSignals
from distill.terms import AttentionTerm, VisionTerm, Weight
from vlm.data.collator import IGNORE

SUPERVISED = "sup"
LEARNED = "log_weight_"  # prefix of the adapters that hold a learned weight's logarithm


class Held(nn.Module):
    """A trained tensor that a call hands out: only inside a module's forward does ZeRO-3 gather its parameters."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        """The tensor."""
        return self.value.clone()


class AlignKD(nn.Module):
    """Student plus adapters; `forward` returns the loss and each unweighted term.

    Args:
        student: its vision tower is frozen, projector and decoder train.
        teacher: None for plain supervised training.
        config: which terms, and their weights.
        tower: turns image references into the tower's patch features [I, P, vision_dim].

    Attributes:
        progress: share of all the run's steps that is done, 0 to 1; whoever trains sets it before each step.
    """

    def __init__(
        self,
        student: LlavaForConditionalGeneration,
        teacher: TeacherSignals | None,
        config: DistillConfig,
        tower: TowerFeatures,
    ) -> None:
        super().__init__()
        student.model.vision_tower.requires_grad_(False)
        if not torch.cuda.is_available():
            student.model.language_model.set_attn_implementation(DENSE)
        self.student = student
        self.recipe = config  # not `config`: into that of a model, the Trainer writes
        self.progress = 0.0
        self.teacher, self.tower = teacher, tower  # no modules: they are neither trained nor saved
        self.terms = config.terms
        self.adapters = adapters(config, teacher, student)
        for name, term in self.terms.items():  # buffers, so that a resumed run goes on with the same automatic weights
            self.register_buffer(f"weight_{name}", torch.tensor(term.weight.start))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        images: list[str],
        keys: list[Key],
        attention_mask: Tensor | None = None,
        records: Tensor | None = None,
        pixels: Tensor | None = None,
        shares: dict[str, float] | None = None,
        **_: object,
    ) -> dict[str, Any]:
        """Loss of one batch (distill.data.rows.Rows.batch; labels already stand on the predicting position).

        Args:
            records: which record of its row each position belongs to, int64 [B, N]; None: a row is one record.
            pixels: of `images`, where they are opened already.
            shares: of this batch in the means of its step, by term (training/shares.py); None: it is the whole step.
        Returns:
            loss: scalar; terms: each unweighted term; weights: the factor of each; silent: names of the terms of which
            this batch says nothing, because it has no image.
        """
        batch = Batch(
            input_ids, position_ids, segments, attention_mask, images, self.tower(images, pixels), keys, records
        )
        on = {name for name in self.terms if self.teacher is not None and self.fade(name) > 0}
        tokens = project(self.student, batch.features)  # E_S, [I, V, D]
        decoder = self.student.model.language_model
        layers = self.recipe.attention.student_layers if self.recipe.attention and "attention" in on else []
        with reading_attention(decoder, layers) as read:
            embeds = merge_vision(self.student, input_ids, tokens)  # [B, N, D]
            states = decoder(**decoder_inputs(batch, embeds)).last_hidden_state  # [B, N, D]
        terms, silent = self._block_terms(batch, on, tokens, read)
        shares = shares or dict.fromkeys([SUPERVISED, *on], 1.0)
        relative = shares["logits"] / (shares[SUPERVISED] or 1.0) if "logits" in on else None
        supervised, kl = self._answer_terms(batch, labels, states, relative)
        terms = {SUPERVISED: supervised, **terms} | ({} if kl is None else {"logits": kl})
        terms = {name: value * shares[name] for name, value in terms.items()}
        weights = {name: self.weight(name) for name in terms if name != SUPERVISED}
        weighted = [weight * terms[name] + self._price(name, weight) for name, weight in weights.items()]
        loss = terms[SUPERVISED] + sum(weighted) + self._idle_adapters(on)
        return {"loss": loss, "terms": terms, "weights": weights, "silent": silent}

    def _block_terms(
        self, batch: Batch, on: set[str], tokens: Tensor, read: dict[int, Read]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The attention and vision terms, and which of them have nothing to say of the batch."""
        terms: dict[str, Tensor] = {}
        silent: list[str] = []
        attention = self.recipe.attention if "attention" in on else None
        vision = self.recipe.vision_tokens if "vision" in on else None
        blocks: list[Tensor] = []  # A_T of each layer, [B, H_T, M, V]
        if attention and self.teacher:
            positions = self._positions(batch, attention.block)
            blocks = self.teacher.attention(batch, attention.teacher_layers, positions)
            terms["attention"] = self._attention_term(attention, blocks, read, batch, positions)
            silent += ["attention"] * positions.empty
        if vision and self.teacher:
            scores = tokens.new_zeros(tokens.shape[:2])  # [I, V]
            if vision.focus_weight and len(tokens):
                scores = self._focus(batch, blocks if attention and attention.block == "text_vision" else [])
            terms["vision"] = self._vision_term(vision, self.teacher.vision_tokens(batch), tokens, scores)
            silent += ["vision"] * (not len(tokens))
        return terms, silent

    def _positions(self, batch: Batch, block: Any) -> Positions:
        image = self.student.config.image_token_id
        return find_positions(batch.input_ids, batch.segments, batch.visible, image, block)

    def _attention_term(
        self, config: AttentionTerm, blocks: list[Tensor], read: dict[int, Read], batch: Batch, where: Positions
    ) -> Tensor:
        """L_A, summed over the pairs of layers."""
        distance = attention_losses.DISTANCES[config.distance]
        columns = own_columns(batch.records, where)  # [B, 1 or M, V]
        values = []
        for layer, theirs, head_map in zip(
            config.student_layers, blocks, wide(self.adapters["attention"]()), strict=True
        ):
            ours = attention_block(read[layer_index(self.student.model.language_model, layer)], batch.visible, where)
            with torch.autocast(ours.device.type, enabled=False):
                values.append(distance(wide(theirs), ours, head_map, where.row_mask, columns))
        return torch.stack(values).sum()

    def _focus(self, batch: Batch, blocks: list[Tensor]) -> Tensor:
        """Focus scores of the batch's vision tokens from the teacher's first-named layer, [I, V]."""
        where = self._positions(batch, "text_vision")
        layers = self.recipe.attention.teacher_layers[:1] if self.recipe.attention else [0]
        assert self.teacher is not None
        attention = (blocks or self.teacher.attention(batch, layers, where))[0]  # A_T, [B, H_T, M, V]
        scores = focus_scores(attention, where.row_mask)[where.column_mask]  # [I*V]
        return scores.view(len(batch.features), -1)  # columns, in order, are the images' tokens, in order

    def _vision_term(self, config: VisionTerm, theirs: Tensor, tokens: Tensor, scores: Tensor) -> Tensor:
        """L_V of the teacher's tokens [I, V, D_T] and the student's [I, V, D_S]."""
        adapter = self.adapters["vision"]
        with torch.autocast(tokens.device.type, enabled=False):
            mapped = wide(adapter(theirs.to(next(adapter.parameters()).dtype)))  # P_V(E_T), [I, V, D_S]
            return vision_mse(mapped, wide(tokens), scores, config.focus_tokens, config.focus_weight)

    def _answer_terms(
        self, batch: Batch, labels: Tensor, states: Tensor, share: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy of the answer tokens, and L_KL unless its share (over the cross-entropy's) is None; states are
        [B, N, D]."""
        answers, theirs, divergence = labels != IGNORE, None, None
        config = self.recipe.logits
        if config and self.teacher and share is not None:
            answers = answers if config.tokens == "answer" else batch.segments >= 0  # [B, N]
            theirs = self.teacher.answers(batch, answers)
            distance = logits_losses.DISTANCES[config.distance]
            divergence = Divergence(distance, config.part, config.temperature, self.weight("logits") * share)
        vocabulary, head = self.student.config.text_config.vocab_size, self.student.lm_head
        together = hasattr(head.weight, "ds_id")  # ZeRO-3 has split it
        return answer_losses(states[answers], labels[answers], head, vocabulary, theirs, divergence, together=together)

    def rule(self, name: str) -> Weight:
        """How the outer weight of a term comes about."""
        weight: Weight = self.terms[name].weight
        return weight

    def fade(self, name: str) -> float:
        """Factor on a term's weight at this point of the run; at 0 the term is not computed."""
        return self.rule(name).fade(self.progress)

    def weight(self, name: str) -> Tensor:
        """Outer weight of a term as the loss has it now, a scalar."""
        learned = self.rule(name).learned is not None
        base = (
            wide(self.adapters[LEARNED + name]()).exp().squeeze(0)
            if learned
            else self.get_buffer(f"weight_{name}").clone()
        )
        return base * self.fade(name)

    def _price(self, name: str, weight: Tensor) -> Tensor | float:
        """What a learned weight costs, -(d / 2) log(beta), so that it does not shrink to nothing."""
        degrees = self.rule(name).learned
        if degrees is None:
            return 0.0
        fade = self.fade(name)
        return -fade * degrees / 2 * (weight / fade).log()

    def _idle_adapters(self, on: set[str]) -> Tensor | float:
        """Zero, with a gradient to the adapters of terms that are off: data-parallel training waits for each."""
        total: Tensor | float = 0.0
        for name, module in self.adapters.items():
            if name.removeprefix(LEARNED) not in on:
                nothing = next(module.parameters()).new_zeros(0, self.teacher.width if self.teacher else 0)
                handed = module() if isinstance(module, Held) else module(nothing)
                total = total + handed.sum() * 0.0
        return total

    def student_parameters(self) -> list[nn.Parameter]:
        """Parameters of the student that train (gradient norms of the terms are taken on these)."""
        return [p for p in self.student.parameters() if p.requires_grad]


def adapters(
    config: DistillConfig, teacher: TeacherSignals | None, student: LlavaForConditionalGeneration
) -> nn.ModuleDict:
    """What is trained beside the student: P_attn for each pair of layers, P_V, and the learned weights' logarithms."""
    found = nn.ModuleDict()
    text = student.config.text_config
    if teacher and config.attention:
        shape = (len(config.attention.student_layers), text.num_attention_heads, teacher.heads)
        found["attention"] = Held(torch.randn(shape) / math.sqrt(teacher.heads))  # P_attn, [pairs, H_S, H_T]
    if teacher and config.vision_tokens:
        found["vision"] = nn.Linear(teacher.width, text.hidden_size)  # P_V, [D_S, D_T] and [D_S]
    for name, term in config.terms.items():
        if teacher and term.weight.learned is not None:
            found[LEARNED + name] = Held(torch.zeros(1))  # DeepSpeed takes no scalars
    return found
