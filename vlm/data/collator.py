"""From records to one batch of tensors: turns about one image share its prefix and cannot see each other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.data.records import Record
from vlm.prompts import ENDINGS, TEMPLATES, EncodesText, prompt_ids

IGNORE = -100
PREFIX, PADDING = 0, -1

Turn = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Row:
    """One record as ids: the prefix (bos, text before the image, image placeholders) and each turn after it.

    Attributes:
        prefix: ids, [P].
        turns: (ids, labels) of each turn; labels are IGNORE where the human speaks.
        image: reference of the image or None.
        too_long: length in tokens, prefix included, of each turn that was left out because it exceeds the context.
    """

    prefix: list[int]
    turns: list[Turn]
    image: str | None
    too_long: tuple[int, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """Turns records into rows with a model's tokenizer and special ids."""

    tokenizer: EncodesText
    bos_id: int
    eos_id: int
    image_token_id: int
    image_tokens: int
    max_length: int

    def row(self, record: Record) -> Row:
        """Tokenize a record; each turn is tokenized exactly as a device tokenizes the prompt (vlm.prompts).

        A turn that does not fit the context together with the prefix is left out, never truncated.
        """
        has_image = record.image is not None
        prefix, turns = [self.bos_id], []
        for question, answer in record.turns:
            before, after = TEMPLATES[record.template](question, has_image)
            if has_image:
                count = self.image_tokens
                prefix = prompt_ids((before, ""), self.tokenizer, self.bos_id, self.image_token_id, count)
            asked = self._encode(after if has_image else before)  # without an image only bos is shared
            ending = ENDINGS[record.template]
            said = self._encode(answer + ending) + ([] if ending else [self.eos_id])
            turns.append(([*asked, *said], [IGNORE] * len(asked) + said))
        lengths = [len(prefix) + len(ids) for ids, _ in turns]
        fitting = [turn for turn, length in zip(turns, lengths, strict=True) if length <= self.max_length]
        return Row(prefix, fitting, record.image, tuple(length for length in lengths if length > self.max_length))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else []


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Pad rows on the right and build the attention mask.

    Returns:
        input_ids, labels, position_ids, segments: int64 [B, N]; segment 0 is the prefix, 1.. the turns, -1 padding.
        attention_mask: bool [B, 1, N, N], True where a query (row) may see a key (column): the prefix and its own turn,
            never a later position. A turn's positions go on from the prefix, so that each turn is exactly what it would
            be alone.
    """
    lengths = [len(row.prefix) + sum(len(ids) for ids, _ in row.turns) for row in rows]
    shape = (len(rows), max(lengths))
    input_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, PADDING, dtype=torch.long)
    for index, row in enumerate(rows):
        ids, targets, place = list(row.prefix), [IGNORE] * len(row.prefix), list(range(len(row.prefix)))
        segment = [PREFIX] * len(row.prefix)
        for number, (turn, wanted) in enumerate(row.turns, 1):
            ids += turn
            targets += wanted
            place += range(len(row.prefix), len(row.prefix) + len(turn))
            segment += [number] * len(turn)
        input_ids[index, : len(ids)] = torch.tensor(ids)
        labels[index, : len(ids)] = torch.tensor(targets)
        positions[index, : len(ids)] = torch.tensor(place)
        segments[index, : len(ids)] = torch.tensor(segment)
    return {
        "input_ids": input_ids,
        "labels": _shift(labels, segments),
        "position_ids": positions,
        "segments": segments,
        "attention_mask": segment_mask(segments),
    }


def _shift(labels: Tensor, segments: Tensor) -> Tensor:
    """Put each label on the position that predicts it, within the turn; a turn's first label is predicted by the last
    prefix position, which only a template without question (plain) needs: its turn follows the prefix directly."""
    shifted = torch.full_like(labels, IGNORE)
    follows = (segments[:, 1:] == segments[:, :-1]) | (segments[:, :-1] == PREFIX)  # [B, N-1]
    shifted[:, :-1] = torch.where(follows, labels[:, 1:], shifted[:, 1:])
    return shifted


def segment_mask(segments: Tensor) -> Tensor:
    """Causal mask in which a position sees the prefix and its own segment: [B, N] -> bool [B, 1, N, N]."""
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]  # [B, N, N]
    # Padding sees only itself: it must not pass for text that looks at the image (distill.probe.find_positions).
    prefix = (segments == PREFIX)[:, None, :] & (segments != PADDING)[:, :, None]  # [B, N, N]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return ((same | prefix) & causal)[:, None]  # [B, 1, N, N]
