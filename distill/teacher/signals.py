"""What the loss asks of a teacher for one batch; the live teacher and the offline cache both answer it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distill.data.rows import Key
from distill.probe import Positions


@dataclass(frozen=True)
class Batch:
    """One batch as teacher and student see it.

    Attributes:
        input_ids, position_ids, segments: int64 [B, N]; segments are negative where there is padding.
        visible: bool [B, 1, N, N], True where a query may see a key; None: every earlier position (padding, if any,
            stands on the right and is read by nobody).
        images: references, in the order of their placeholders.
        features: the shared vision tower's patch features of the images, [I, P, vision_dim].
        keys: one per record, in order of appearance.
        records: which record of its row each position belongs to, int64 [B, N]; None: a row is one record.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    visible: Tensor | None
    images: list[str]
    features: Tensor
    keys: list[Key]
    records: Tensor | None = None


@dataclass(frozen=True)
class Hidden:
    """Exact answers: last hidden states [A, D_T] and the head that turns some of them into logits."""

    states: Tensor
    head: Callable[[Tensor], Tensor]

    def part(self, tokens: slice | Tensor) -> "Hidden":
        """Those of some tokens."""
        return Hidden(self.states[tokens], self.head)


@dataclass(frozen=True)
class TopK:
    """Compact answers: the k likeliest tokens' ids and log-probabilities (at the term's temperature), each [A, k]."""

    ids: Tensor
    log_probabilities: Tensor

    def part(self, tokens: slice | Tensor) -> "TopK":
        """Those of some tokens."""
        return TopK(self.ids[tokens], self.log_probabilities[tokens])


class TeacherSignals(Protocol):
    """A teacher, live or cached. Nothing it returns carries a gradient."""

    @property
    def heads(self) -> int:
        """Attention heads of the decoder, H_T."""

    @property
    def width(self) -> int:
        """Hidden size of the decoder, D_T."""

    def vision_tokens(self, batch: Batch) -> Tensor:
        """E_T, [I, V, D_T]."""

    def attention(self, batch: Batch, layers: list[int], positions: Positions) -> list[Tensor]:
        """A_T of each layer: its block at `positions`, [B, H_T, M, V]."""

    def answers(self, batch: Batch, wanted: Tensor) -> Hidden | TopK:
        """What the teacher says next at the positions `wanted`, bool [B, N], in order."""
