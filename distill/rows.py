"""The training data of one stage: records tokenized when asked for, put together to batches, too long turns counted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from distill.config import Data, Stage
from vlm.data.collator import Encoder, Row, collate
from vlm.data.records import Record, read_llava, scene_captions, scene_conversations
from vlm.errors import UserError

Key = tuple[str, int]  # stage and index: two records of different stages, or of one file, may have the same id


class Rows(Dataset[tuple[Key, Row]]):
    """Records of a stage as (key, row).

    Args:
        stage: its name and data.
        encoder: turns a record into ids.
        too_long: file that gets a line "index turns" for each record that loses turns; one that is there is continued,
            so that the count survives an interruption.
    """

    def __init__(self, stage: Stage, encoder: Encoder, too_long: Path) -> None:
        self.stage, self.encoder, self.file = stage, encoder, too_long
        self.records = _records(stage.data)
        self.too_long = _read(too_long)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Key, Row]:
        row = self.encoder.row(self.records[index])
        if row.too_long and index not in self.too_long:
            self.too_long[index] = len(row.too_long)
            with self.file.open("a") as file:
                file.write(f"{index} {len(row.too_long)}\n")
        return (self.stage.name, index), row

    def batch(self, items: list[tuple[Key, Row]]) -> dict[str, Any]:
        """Collate the rows that kept a turn; image references and keys travel as lists.

        Raises:
            UserError: none did, so there is nothing to train on.
        """
        kept = [(key, row) for key, row in items if row.turns]
        if not kept:
            (_, index), row = items[0]
            raise UserError(
                f"stage {self.stage.name}: record {self.records[index].id!r} needs {min(row.too_long)} tokens with its "
                f"shortest turn, the student's context holds {self.encoder.max_length}, and no other record of its "
                "batch fits. Raise the student's max_position_embeddings, or remove or shorten such records."
            )
        rows = [row for _, row in kept]
        images = [row.image for row in rows if row.image is not None]
        return {**collate(rows), "images": images, "keys": [key for key, _ in kept]}


def too_long_report(stage: str, file: Path, max_length: int) -> list[str]:
    """Say how many turns a stage left out, from the file its `Rows` wrote; nothing if none."""
    counts = _read(file)
    if not counts:
        return []
    return [
        f"Stage {stage}: {sum(counts.values())} turns of {len(counts)} records were left out: with their prefix they "
        f"are longer than the context of {max_length} tokens."
    ]


def _records(data: Data) -> Sequence[Record]:
    if data.kind == "llava":
        return read_llava(Path(data.records or ""), Path(data.images or ""), data.template or "v1")
    make = scene_captions if data.kind == "scene_captions" else scene_conversations
    return make(data.start, data.count)


def _read(file: Path) -> dict[int, int]:
    lines = file.read_text().splitlines() if file.is_file() else []
    return {int(index): int(turns) for index, turns in (line.split() for line in lines)}
