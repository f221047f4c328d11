"""The student's own answers, in the place of the data's: what on-policy distillation (GKD, ICLR 2024) compares.

All turns of a batch are answered side by side, token by token: the question's keys and values are computed once, and
every turn's next token is one more query, which sees its record's prefix, its own question and its own tokens.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from distill.dense_attention import additive_mask, decoder_inputs
from distill.merge import merge_vision
from distill.teacher.signals import Batch
from vlm.data.collator import IGNORE


@torch.no_grad()
def own_answers(
    student: LlavaForConditionalGeneration,
    batch: Batch,
    labels: Tensor,
    tokens: Tensor,
    temperature: float,
    generator: torch.Generator,
) -> tuple[Batch, Tensor]:
    """The batch with the student's answers, at most as long as the data's, and the positions that predict them.

    Args:
        student: what answers.
        batch: turns that cannot see each other, each with one answer.
        labels: on the predicting positions, else IGNORE, [B, N]; an answer ends with the token that ends the data's.
        tokens: E_S, [I, V, D_S].
        temperature: of the sampling; 0 takes the likeliest token.
        generator: on the CPU, of the sampling.
    Returns:
        The batch, and bool [B, N].
    """
    said = labels != IGNORE  # [B, N]
    edge = said.new_zeros(len(said), 1)
    row, first = (said & ~torch.cat([edge, said[:, :-1]], 1)).nonzero(as_tuple=True)  # [T], turn after turn
    _, last = (said & ~torch.cat([said[:, 1:], edge], 1)).nonzero(as_tuple=True)  # [T]
    ids, wanted, length, end = batch.input_ids.clone(), torch.zeros_like(said), last - first + 1, labels[row, last]
    placeholder = torch.tensor([student.config.image_token_id], device=labels.device)
    writer = _Writer(student, batch, tokens, row, first)
    step, going = 0, torch.ones_like(row, dtype=torch.bool)  # [T], turns that have not ended
    while bool(going.any()):
        logits = student.lm_head(writer.states).float()  # [T, vocabulary]
        logits = logits.index_fill(-1, placeholder, float("-inf"))  # it is no answer: it would want a picture
        chosen = _choose(logits, temperature, generator)  # [T]
        wanted[row[going], first[going] + step] = True
        ids[row[going], first[going] + step + 1] = chosen[going]
        step += 1
        going &= (chosen != end) & (step < length)
        if bool(going.any()):
            writer.add(chosen)
    return replace(batch, input_ids=ids), wanted


class _Writer:
    """The decoder at the end of each turn, with the keys and values of all before it.

    Attributes:
        states: last hidden states that predict each turn's next token, [T, D].
    """

    def __init__(
        self, student: LlavaForConditionalGeneration, batch: Batch, tokens: Tensor, row: Tensor, first: Tensor
    ) -> None:
        assert batch.visible is not None  # turns that cannot see each other have a mask
        self.student, self.row = student, row
        inputs = decoder_inputs(batch, merge_vision(student, batch.input_ids, tokens))
        found = student.model.language_model(**{**inputs, "use_cache": True})
        self.states, self.cache = found.last_hidden_state[row, first], found.past_key_values
        counts = torch.bincount(row, minlength=len(batch.input_ids))  # [B]
        self.slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]  # [T], within its row
        shape = (len(counts), int(counts.max()))
        self.positions = torch.zeros(shape, dtype=torch.long, device=row.device)  # [B, W]
        self.positions[row, self.slot] = batch.position_ids[row, first]
        self.visible = batch.visible.new_zeros(*shape, batch.input_ids.shape[1])  # [B, W, N], then one W a token
        self.visible[row, self.slot] = batch.visible[row, 0, first]

    def add(self, chosen: Tensor) -> None:
        """One token a turn, [T]."""
        ids = torch.zeros_like(self.positions)  # [B, W]
        ids[self.row, self.slot] = chosen
        self.positions += 1
        own = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device).expand(len(ids), -1, -1)  # [B, W, W]
        self.visible = torch.cat([self.visible, own], dim=-1)
        embeds = self.student.get_input_embeddings()(ids)  # [B, W, D]
        found = self.student.model.language_model(
            inputs_embeds=embeds,
            attention_mask=additive_mask(self.visible[:, None], embeds.dtype),
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.states = found.last_hidden_state[self.row, self.slot]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token for each of the logits [T, vocabulary]."""
    if not temperature:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
