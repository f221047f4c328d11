"""The module that is trained: a student, the throw-away adapters, and the loss L = L_sup + L_A + L_V + L_KL."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from distill.adapters import LEARNED, adapters, nothing
from distill.config import DistillConfig
from distill.data.rows import Key
from distill.dense_attention import DENSE, decoder_inputs
from distill.features import TowerFeatures
from distill.losses import attention as attention_losses
from distill.losses import logits as logits_losses
from distill.losses.answers import Divergence, answer_losses, divergence_alone
from distill.losses.vision import focus_scores, instruction_rows, vision_mse, weighted_mse
from distill.merge import merge_vision, project
from distill.on_policy import own_answers
from distill.precision import wide
from distill.probe import Positions, Read, attention_block, find_positions, layer_index, own_columns, reading_attention
from distill.spoken import compared, read_of_teacher
from distill.teacher.live import Teacher
from distill.teacher.signals import Batch, Hidden, TeacherSignals, TopK
from distill.terms import AttentionTerm, VisionTerm, Weight
from vlm.data.collator import IGNORE

SUPERVISED = "sup"
OF_IMAGES = ("vision", "vision_logits", "switch")  # terms that have nothing to say of text alone


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
        terms, silent = self._block_terms(batch, on, tokens, read, labels)
        shares = shares or dict.fromkeys([SUPERVISED, *on], 1.0)
        spoken = self._spoken_terms(batch, labels, states, tokens, on, shares)
        terms = {SUPERVISED: spoken.pop(SUPERVISED), **terms, **spoken}
        terms = {name: value * shares[name] for name, value in terms.items()}
        weights = {name: self.weight(name) for name in terms if name != SUPERVISED}
        weighted = [weight * terms[name] + self._price(name, weight) for name, weight in weights.items()]
        loss = terms[SUPERVISED] + sum(weighted) + self._idle_adapters(on)
        return {"loss": loss, "terms": terms, "weights": weights, "silent": silent}

    def _block_terms(
        self, batch: Batch, on: set[str], tokens: Tensor, read: dict[int, Read], labels: Tensor
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The attention and vision terms, and which terms have nothing to say of the batch."""
        terms: dict[str, Tensor] = {}
        silent = [] if len(tokens) else [name for name in OF_IMAGES if name in on]
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
            if vision.reads_attention and len(tokens):
                known = blocks if attention and attention.block == "text_vision" else []
                scores = self._focus(batch, known, labels if vision.weighting == "instruction" else None)
            terms["vision"] = self._vision_term(vision, self.teacher.vision_tokens(batch), tokens, scores)
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

    def _focus(self, batch: Batch, blocks: list[Tensor], labels: Tensor | None) -> Tensor:
        """Focus scores of the batch's vision tokens from the teacher's first-named layer, [I, V]; of the instruction's
        text alone if the labels tell it from the answers'."""
        where = self._positions(batch, "text_vision")
        layers = self.recipe.attention.teacher_layers[:1] if self.recipe.attention else [0]
        assert self.teacher is not None
        attention = (blocks or self.teacher.attention(batch, layers, where))[0]  # A_T, [B, H_T, M, V]
        rows = where.row_mask if labels is None else instruction_rows(labels, where.rows, where.row_mask)
        scores = focus_scores(attention, rows)[where.column_mask]  # [I*V]
        return scores.view(len(batch.features), -1)  # columns, in order, are the images' tokens, in order

    def _vision_term(self, config: VisionTerm, theirs: Tensor, tokens: Tensor, scores: Tensor) -> Tensor:
        """L_V of the teacher's tokens [I, V, D_T] and the student's [I, V, D_S]."""
        adapter = self.adapters["vision"]
        with torch.autocast(tokens.device.type, enabled=False):
            mapped = wide(adapter(theirs.to(next(adapter.parameters()).dtype)))  # P_V(E_T), [I, V, D_S]
            if config.weighting == "instruction":
                return weighted_mse(mapped, wide(tokens), scores)
            return vision_mse(mapped, wide(tokens), scores, config.focus_tokens, config.focus_weight)

    def _spoken_terms(
        self, batch: Batch, labels: Tensor, states: Tensor, tokens: Tensor, on: set[str], shares: dict[str, float]
    ) -> dict[str, Tensor]:
        """Cross-entropy of the answer tokens, and the terms that compare distributions over the next token.

        Args:
            states: last hidden states of the student, [B, N, D_S]; tokens: E_S, [I, V, D_S].
            on: names of the terms that are computed; shares: of the batch in the means of its step.
        """
        image: int = self.student.config.image_token_id
        places = compared(self.recipe, batch.input_ids, labels, batch.segments, image)
        theirs = self._said(batch, places, on)
        head = self.student.lm_head
        vocabulary, together = self.student.config.text_config.vocab_size, hasattr(head.weight, "ds_id")  # ZeRO-3's
        own, divergence = labels != IGNORE, None
        sampling = self._sampling() if "logits" in on else None
        if "logits" in on and sampling is None:
            own = places["logits"]
            divergence = self._divergence("logits", shares["logits"] / (shares[SUPERVISED] or 1.0))
        said = theirs["logits"] if divergence else None
        supervised, kl = answer_losses(states[own], labels[own], head, vocabulary, said, divergence, together=together)
        kl = kl if sampling is None else self._on_policy_term(batch, labels, tokens, sampling)
        found = {SUPERVISED: supervised} | ({} if kl is None else {"logits": kl})
        if "vision_logits" in on:
            seen, divergence = states[places["vision_logits"]], self._divergence("vision_logits")
            found["vision_logits"] = divergence_alone(
                seen, head, vocabulary, theirs["vision_logits"], divergence, together
            )
        if "switch" in on:
            found["switch"] = self._switch_term(batch, tokens, places["switch"], theirs["switch"])
        return found

    def _said(self, batch: Batch, places: dict[str, Tensor], on: set[str]) -> dict[str, Hidden | TopK]:
        """What the teacher says next at the places of each term that is on."""
        if self.teacher is None or not on & places.keys():
            return {}
        wanted = read_of_teacher(places)
        said = self.teacher.answers(batch, wanted)
        return {name: said.part(place[wanted]) for name, place in places.items() if name in on}

    def _divergence(self, name: str, share: float = 1.0) -> Divergence:
        config = getattr(self.recipe, name)
        distance = logits_losses.DISTANCES[config.distance]
        return Divergence(distance, config.part, config.temperature, self.weight(name) * share)

    def _sampling(self) -> torch.Generator | None:
        """What the student's own answers are drawn with, if this step compares them; the same in a resumed run."""
        on_policy = self.recipe.logits and self.recipe.logits.on_policy
        if not on_policy:
            return None
        generator = torch.Generator().manual_seed(self.recipe.seed * 2**32 + round(self.progress * 2**31))
        return generator if float(torch.rand(1, generator=generator)) < on_policy.share else None

    def _on_policy_term(self, batch: Batch, labels: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """L_KL of the student's own answers."""
        assert isinstance(self.teacher, Teacher) and self.recipe.logits and self.recipe.logits.on_policy
        temperature = self.recipe.logits.on_policy.temperature
        own, wanted = own_answers(self.student, batch, labels, tokens, temperature, generator)
        embeds = merge_vision(self.student, own.input_ids, tokens)  # [B, N, D]
        states = self.student.model.language_model(**decoder_inputs(own, embeds)).last_hidden_state[wanted]
        vocabulary, theirs = self.student.config.text_config.vocab_size, self.teacher.says(own, wanted)
        return divergence_alone(states, self.student.lm_head, vocabulary, theirs, self._divergence("logits"))

    def _switch_term(self, batch: Batch, tokens: Tensor, answers: Tensor, theirs: Hidden | TopK) -> Tensor:
        """L_switch: the teacher's answers (bool [B, N]) from P_switch(E_S), of [I, V, D_S], against its own."""
        adapter = self.adapters["switch"]
        mapped: Tensor = adapter(tokens.to(next(adapter.parameters()).dtype))  # [I, V, D_T]
        if not len(mapped):
            return mapped.sum()
        assert isinstance(self.teacher, Teacher)  # guaranteed by DistillConfig
        states, model = self.teacher.switched(batch, mapped)[answers], self.teacher.model  # [A, D_T]
        vocabulary = model.config.text_config.vocab_size
        return divergence_alone(states, model.lm_head, vocabulary, theirs, self._divergence("switch"))

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
                total = total + nothing(module)
        return total

    def student_parameters(self) -> list[nn.Parameter]:
        """Parameters of the student that train (gradient norms of the terms are taken on these)."""
        return [p for p in self.student.parameters() if p.requires_grad]
