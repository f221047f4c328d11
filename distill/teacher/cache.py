"""Offline teacher: its outputs for every record, read from files, so that training needs no teacher in memory.

A folder of shards, each with the records of one stretch of a stage; cache_writer.py writes it. `exact` holds what the
terms of the loss read of the live teacher: last hidden states of the answers, projected vision tokens, blocks
of attention, all in float16; `compact` holds the likeliest tokens of each answer position alone.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.probe import Positions
from distill.teacher.signals import Batch, Hidden, TopK
from vlm.errors import UserError

MANIFEST, TEACHER = "cache.json", "teacher.safetensors"
OPEN_SHARDS = 256


@dataclass(frozen=True)
class Entry:
    """Outputs for one record; what the run does not read is None.

    Attributes:
        answers: last hidden states [A, D_T], or log-probabilities [A, k]; ids: of those, [A, k].
        tokens: E_T, [I, V, D_T]; of a record of text alone [0, V, D_T].
        attention: block name -> one [H_T, M, V] per layer.
    """

    answers: Tensor | None
    ids: Tensor | None
    tokens: Tensor | None
    attention: dict[str, list[Tensor]]


class CachedTeacher:
    """What is asked of a teacher, from a complete cache (distill.teacher.signals.TeacherSignals)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / MANIFEST).read_text())
        self.heads, self.width = int(self.manifest["heads"]), int(self.manifest["width"])
        weights = load_file(folder / TEACHER)
        self.probe = weights["probe"]  # the tower's features of a fixed picture, [P, vision_dim]
        self.head: nn.Linear | None = None
        if "head" in weights:
            vocabulary, width = weights["head"].shape
            self.head = nn.Linear(width, vocabulary, bias=False, device="meta").requires_grad_(False)
            # A CPU multiplies float16 three times as slowly as float32.
            head = weights["head"] if torch.cuda.is_available() else weights["head"].float()
            self.head.weight = nn.Parameter(head, requires_grad=False)
        self._open = lru_cache(OPEN_SHARDS)(Shard)

    def vision_tokens(self, batch: Batch) -> Tensor:
        """E_T, [I, V, D_T]."""
        found = torch.cat([entry.tokens for entry in self._entries(batch) if entry.tokens is not None])
        self._same(batch, len(found), len(batch.features), "images")
        return found.to(batch.features.device)

    def attention(self, batch: Batch, layers: list[int], positions: Positions) -> list[Tensor]:
        """A_T of each layer: the records' blocks on the diagonal of each row's, [B, H_T, M, V]."""
        name = block_name(positions)
        shape = (len(positions.rows), self.heads, positions.rows.shape[1], positions.columns.shape[1])
        found = [torch.zeros(shape, dtype=torch.float16) for _ in layers]
        if positions.empty:
            return [block.to(batch.features.device) for block in found]
        held = dict(self.manifest["identity"]["the layers and blocks of attention"])[name]
        wanted = positions.row_mask.sum(-1).tolist()
        row, top, left = 0, 0, 0  # of the batch, and within its block
        for entry in self._entries(batch):
            blocks = [entry.attention[name][held.index(layer)] for layer in layers]
            _, height, width = blocks[0].shape
            if not height or not width:
                continue
            while row < len(wanted) and top >= wanted[row]:
                row, top, left = row + 1, 0, 0
            if row == len(wanted) or top + height > wanted[row] or left + width > shape[3]:
                self._same(batch, top + height, 0 if row == len(wanted) else wanted[row], "rows of attention")
            for into, block in zip(found, blocks, strict=True):
                into[row, :, top : top + height, left : left + width] = block
            top, left = top + height, left + width
        return [block.to(batch.features.device) for block in found]

    def answers(self, batch: Batch, wanted: Tensor) -> Hidden | TopK:
        """What the teacher says next at the positions `wanted`, bool [B, N]."""
        entries = list(self._entries(batch))
        device = batch.features.device
        values = torch.cat([entry.answers for entry in entries if entry.answers is not None])  # [A, D_T] or [A, k]
        self._same(batch, len(values), int(wanted.sum()), "answer tokens")
        if self.head is None:
            ids = torch.cat([entry.ids for entry in entries if entry.ids is not None])  # [A, k]
            return TopK(ids.to(device, torch.long), values.to(device, torch.float32))
        self.head.to(device)
        return Hidden(values.to(device, self.head.weight.dtype), self.head)

    def _entries(self, batch: Batch) -> Iterator[Entry]:
        size = self.manifest["shard_records"]
        for stage, index in batch.keys:
            file = self.folder / shard_name(stage, index // size)
            try:
                yield self._open(file).entry(index)
            except (OSError, KeyError) as error:
                raise UserError(
                    f"{file}: record {index} of stage {stage} is not there ({error}). {again(self.folder)}"
                ) from error

    def _same(self, batch: Batch, found: int, expected: int, what: str) -> None:
        if found != expected:
            raise UserError(
                f"{self.folder}: {found} {what} of the records {batch.keys} found, {expected} expected: the data has "
                f"changed since. {again(self.folder)}"
            )


class Shard:
    """One file of the cache, mapped into memory; its tensors are named record/output."""

    def __init__(self, file: Path) -> None:
        self.file = safe_open(str(file), "pt")
        self.names = sorted(self.file.keys())

    def entry(self, index: int) -> Entry:
        """Outputs for the record `index` of the stage.

        Raises:
            KeyError: the record has none.
        """
        own = {name.partition("/")[2]: name for name in self.names if name.startswith(f"{index}/")}
        if not own:
            raise KeyError(index)
        found = {output: self.file.get_tensor(name) for output, name in own.items()}
        attention: dict[str, list[Tensor]] = {}
        for output in own:  # sorted by block and layer
            if output.startswith("attention/"):
                attention.setdefault(output.split("/")[1], []).append(found[output])
        return Entry(found.get("answers"), found.get("ids"), found.get("tokens"), attention)


def tensors_of(index: int, entry: Entry) -> dict[str, Tensor]:
    """What a shard holds of a record: the inverse of `Shard.entry`."""
    found = {"answers": entry.answers, "ids": entry.ids, "tokens": entry.tokens}
    for name, blocks in entry.attention.items():
        found |= {f"attention/{name}/{number:03}": block for number, block in enumerate(blocks)}
    return {f"{index}/{output}": value.contiguous() for output, value in found.items() if value is not None}


def block_name(positions: Positions) -> str:
    """`text_vision` if rows are other positions than columns, else `square`: a run reads at most one of each kind."""
    same = positions.rows.shape == positions.columns.shape and torch.equal(positions.rows, positions.columns)
    return "square" if same else "text_vision"


def shard_name(stage: str, number: int) -> str:
    """File name of a stage's shard."""
    return f"{stage}-{number:06}.safetensors"


def again(folder: Path) -> str:
    """The way out of a cache that does not fit."""
    return f"Remove {folder} (it is then made again), or name another folder in cache.folder."
