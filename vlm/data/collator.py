"""From records to one batch of tensors; several records may share a row, and none sees another.

Turns about one image that are independent questions share the record's prefix and cannot see each other. A sequential
conversation is one turn, token for token as upstream's LLaVA and MobileVLM train it.
"""

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Protocol

import torch
from torch import Tensor

from vlm.data.records import Record
from vlm.prompts import ENDINGS, IMAGE, TEMPLATES, V1_SYSTEM, EncodesText, prompt_ids

IGNORE = -100
PREFIX, PADDING = 0, -1

Turn = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Row:
    """One record as ids: the prefix (bos; independent turns' text before the image and its placeholders), the turns.

    Attributes:
        prefix: ids, [P].
        turns: (ids, labels) of each turn; labels are IGNORE where the human speaks. A sequential conversation is one.
        images: references, in the order of their placeholders.
        too_long: length in tokens, prefix included, of each turn that was left out because it exceeds the context.
        sequential: the row is one conversation, in which a position sees all before it.
        pixels: [I, 3, S, S] of the images, where whoever made the row has opened them.
    """

    prefix: list[int]
    turns: list[Turn]
    images: tuple[str, ...]
    too_long: tuple[int, ...] = ()
    sequential: bool = False
    pixels: Tensor | None = None

    def __len__(self) -> int:
        """Number of tokens, image placeholders included: the length of the embeddings."""
        return len(self.prefix) + sum(len(ids) for ids, _ in self.turns)

    def with_pixels(self, pixels: Tensor) -> "Row":
        """The row with its opened images."""
        return replace(self, pixels=pixels)

    def without_turns(self) -> "Row":
        """The row of a record that cannot be used."""
        return replace(self, turns=[], images=(), pixels=None)


class Vocabulary(EncodesText, Protocol):
    """A tokenizer that can be told from others."""

    def identity(self) -> str:
        """Return a text that differs if any id could differ."""


@dataclass(frozen=True)
class Encoder:
    """Turns records into rows with a model's tokenizer and special ids."""

    tokenizer: Vocabulary
    bos_id: int
    eos_id: int
    image_token_id: int
    image_tokens: int
    max_length: int

    def row(self, record: Record) -> Row:
        """Tokenize a record; each turn is tokenized exactly as a device tokenizes the prompt (vlm.prompts).

        A turn that does not fit the context together with the prefix is left out, never truncated.
        """
        prefix, turns = self._parts(record)
        lengths = [len(prefix) + len(ids) for ids, _ in turns]
        fitting = [turn for turn, length in zip(turns, lengths, strict=True) if length <= self.max_length]
        too_long = tuple(length for length in lengths if length > self.max_length)
        return Row(prefix, fitting, record.images, too_long, record.sequential)

    def length(self, record: Record) -> int:
        """Number of tokens of a whole record, each image counted as its vision tokens."""
        prefix, turns = self._parts(record)
        return len(prefix) + sum(len(ids) for ids, _ in turns)

    def identity(self) -> str:
        """SHA-256 of all that decides how a record becomes ids."""
        special = [self.bos_id, self.eos_id, self.image_token_id, self.image_tokens]
        return sha256(f"{self.tokenizer.identity()}{special}".encode()).hexdigest()

    def _parts(self, record: Record) -> tuple[list[int], list[Turn]]:
        return ([self.bos_id], [self._conversation(record)]) if record.sequential else self._questions(record)

    def _questions(self, record: Record) -> tuple[list[int], list[Turn]]:
        """Prefix and turns of independent questions about one image or none."""
        has_image = bool(record.images)
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
        return prefix, turns

    def _conversation(self, record: Record) -> Turn:
        """A whole conversation after bos; answers and what ends them are the labels.

        v1: "SYSTEM USER: q ASSISTANT: a</s>USER: q ASSISTANT: a</s>", plain: images, caption, line break. Text between
        placeholders is tokenized by itself, and so is what follows an end token, as upstream's tokenizer does. An
        answer, too: after the colon a LLaMA tokenizer begins a new piece, and so do a device's answers.
        """
        if record.template == "plain":
            shown = [self.image_token_id] * self.image_tokens * len(record.images)
            caption = self._encode(record.turns[0][1] + ENDINGS["plain"])
            return [*shown, *caption], [IGNORE] * len(shown) + caption
        ids: list[int] = []
        labels: list[int] = []
        head = f"{V1_SYSTEM} "
        for question, answer in record.turns:
            asked = self._with_images(f"{head}USER: {question} ASSISTANT:")
            said = [*self._encode(answer), self.eos_id]
            ids += [*asked, *said]
            labels += [IGNORE] * len(asked) + said
            head = ""
        return ids, labels

    def _with_images(self, text: str) -> list[int]:
        first, *others = text.split(IMAGE)
        ids = self._encode(first)
        for part in others:
            ids += [self.image_token_id] * self.image_tokens + self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else []


def collate(rows: list[Row], counts: list[int] | None = None) -> dict[str, Tensor | None]:
    """Pad rows on the right, several records side by side if wanted, and build the attention mask.

    Args:
        rows: one per record.
        counts: how many records, in order, each row of the batch takes; None: one each.
    Returns:
        input_ids, labels, position_ids, segments, records: int64 [B, N]; labels stand on the position that predicts
            them; segment 0 is a record's prefix, 1.. its turns, -1 padding; `records` numbers the records of a
            batch row from 0, -1 padding. A record's positions begin at 0, a turn's go on from the prefix, so that each
            turn is exactly what it would be alone.
        attention_mask: bool [B, 1, N, N], True where a query (row) may see a key (column): its record's prefix and its
            own turn, never a later position. None if every batch row is one conversation: then causal attention
            with padding on the right is the same.
    Raises:
        ValueError: a turn after the first begins with a label: nothing before it could predict that.
    """
    places = iter(rows)
    packs = [[next(places) for _ in range(count)] for count in counts or [1] * len(rows)]
    shape = (len(packs), max(sum(map(len, pack)) for pack in packs))
    input_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, PADDING, dtype=torch.long)
    records = torch.full(shape, PADDING, dtype=torch.long)
    for index, pack in enumerate(packs):
        start = 0
        for record, row in enumerate(pack):
            here = (index, slice(start, start + len(row)))
            _place(row, input_ids[here], labels[here], positions[here], segments[here])
            records[here] = record
            start += len(row)
    causal = all(len(pack) == 1 and pack[0].sequential for pack in packs)
    if causal:  # on through the padding: a jump back would be a packed record to transformers, which builds a mask
        positions = torch.arange(shape[1]).repeat(shape[0], 1)
    return {
        "input_ids": input_ids,
        "labels": _shift(labels, segments),
        "position_ids": positions,
        "segments": segments,
        "records": records,
        "attention_mask": None if causal else segment_mask(segments, records),
    }


def _place(row: Row, input_ids: Tensor, labels: Tensor, positions: Tensor, segments: Tensor) -> None:
    """Write a row's ids, labels, positions and segments into its stretch of the batch, views of [len(row)]."""
    shared = len(row.prefix)
    ids, targets, place, segment = list(row.prefix), [IGNORE] * shared, list(range(shared)), [PREFIX] * shared
    for number, (turn, wanted) in enumerate(row.turns, 1):
        if number > 1 and wanted[0] != IGNORE:
            raise ValueError("a turn without a question is predicted from the prefix; a record can have only one")
        ids += turn
        targets += wanted
        place += range(shared, shared + len(turn))
        segment += [number] * len(turn)
    for tensor, values in ((input_ids, ids), (labels, targets), (positions, place), (segments, segment)):
        tensor.copy_(torch.tensor(values))


def _shift(labels: Tensor, segments: Tensor) -> Tensor:
    """Put each label on the position that predicts it, within the turn; a turn's first label is predicted by the last
    prefix position, which only a template without question (plain) needs: its turn follows the prefix directly."""
    shifted = torch.full_like(labels, IGNORE)
    follows = (segments[:, 1:] == segments[:, :-1]) | (segments[:, :-1] == PREFIX)  # [B, N-1]
    shifted[:, :-1] = torch.where(follows, labels[:, 1:], shifted[:, 1:])
    return shifted


def segment_mask(segments: Tensor, records: Tensor | None = None) -> Tensor:
    """Causal mask in which a position sees its record's prefix and its own segment: [B, N] -> bool [B, 1, N, N].

    Without `records` a row is one record.
    """
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]  # [B, N, N]
    # Padding sees only itself: it must not pass for text that looks at the image (distill.probe.find_positions).
    prefix = (segments == PREFIX)[:, None, :] & (segments != PADDING)[:, :, None]  # [B, N, N]
    visible = (same | prefix) & torch.ones(length, length, dtype=torch.bool).tril()  # [B, N, N]
    if records is not None:
        visible &= records[:, :, None] == records[:, None, :]
    return visible[:, None]  # [B, 1, N, N]
