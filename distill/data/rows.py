"""The training data of one stage: records tokenized when asked for, put together to batches, what is unfit counted."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from distill.config import Stage
from distill.data.opening import Progress, open_data
from distill.data.quarantine import Entry, Quarantine
from vlm.data.collator import Encoder, Row, collate
from vlm.data.index import BrokenRecord
from vlm.data.records import SCENES, Record, load_image
from vlm.data.store import Conversations
from vlm.errors import UserError
from vlm.manifest import Preprocessing
from vlm.preprocess import pixel_values

Key = tuple[str, int]  # stage and index: two records of different stages, or of one file, may have the same id
Item = tuple[Key, Row]
TRIED = 1000  # records tried in the place of a batch that keeps none


class Rows(Dataset[Item | list[Item]]):
    """Records of a stage as (key, row); index a tuple of records for those that share a row of the batch.

    Args:
        stage: its name and data.
        encoder: turns a record into ids.
        quarantine: gets an entry for each record that is broken or loses turns.
        preprocessing: how images become pixels; given, images are opened here, in the data workers, and the batch has
            `pixels`. None: files are only tried. The built-in scenes are never opened here: they cannot be broken.
        progress: is told while records are indexed and measured.
    Attributes:
        lengths: int32 [n] in embedding tokens, negative for text alone; None for scenes.
        max_length: most tokens of a row of a batch.
    """

    def __init__(
        self,
        stage: Stage,
        encoder: Encoder,
        quarantine: Quarantine,
        preprocessing: Preprocessing | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.stage, self.encoder, self.quarantine, self.preprocessing = stage, encoder, quarantine, preprocessing
        self.records: Sequence[Record] = open_data(stage.data, encoder, stage.name, progress)
        self.lengths, self.max_length, self.total = None, encoder.max_length, len(self.records)
        if isinstance(self.records, Conversations):
            self.lengths, self.max_length = self.records.lengths, self.records.max_length
            self.total = self.records.total
            quarantine.note_too_long(self.records.too_long, self.max_length)
            quarantine.add(Entry(b.part, b.record, "", b.path, b.reason) for b in self.records.broken)
            self.check()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, ...]) -> Item | list[Item]:
        if isinstance(index, tuple):
            return [self.item(one) for one in index]
        return self.item(index)

    def item(self, index: int) -> Item:
        """One record; a broken one has no turns, and an entry in the quarantine."""
        key = (self.stage.name, index)
        try:
            record = self.records[index]
        except BrokenRecord as error:  # the file was changed after it was measured
            self._leave_out(index, "", "", str(error))
            return key, Row([self.encoder.bos_id], [], ())
        row = self.encoder.row(record)
        if row.too_long:
            reason = f"turns of {sorted(row.too_long)} tokens do not fit into {self.encoder.max_length}"
            self._leave_out(index, record.id, "", reason, len(row.too_long))
        return key, self._with_pixels(index, record, row)

    def _with_pixels(self, index: int, record: Record, row: Row) -> Row:
        pixels = []
        for image in record.images:
            if image.startswith(SCENES):
                continue
            try:
                opened = load_image(image)
                if self.preprocessing:
                    pixels.append(torch.from_numpy(pixel_values(opened, self.preprocessing)))
            except Exception as error:  # whatever a decoder raises on a broken file; it becomes an entry
                self._leave_out(index, record.id, image, str(error).removeprefix(f"{image}: "))
                return row.without_turns()
        return row.with_pixels(torch.cat(pixels)) if pixels else row

    def _leave_out(self, index: int, record_id: str, path: str, reason: str, turns: int = 0) -> None:
        part: str = self.stage.data.kind
        place = index
        if isinstance(self.records, Conversations):
            part, place = self.records.place(index)
        if self.quarantine.add([Entry(part, place, record_id, path, reason, turns)]) and get_worker_info() is None:
            self.check()

    def check(self) -> None:
        """End the run if too many records are broken; with data workers the training process calls this now and then.

        Raises:
            UserError: more than the stage's share; names some of them and the list.
        """
        share, broken = self.stage.data.max_broken, self.quarantine.broken()
        if len(broken) > share * self.total:
            first = "".join(f"\n  {e.part}, record {e.record}: {e.why}" for e in broken[:5])
            raise UserError(
                f"stage {self.stage.name}: {len(broken)} of {self.total} records are broken, more than max_broken: "
                f"{share}. The first:{first}\nAll are in {self.quarantine.folder}. Repair or remove them, or raise "
                "max_broken of the stage's data."
            )

    def batch(self, items: Sequence[Item | list[Item]]) -> dict[str, Any]:
        """Collate the records that kept a turn.

        Returns:
            What vlm.data.collator.collate does, and
            images: references, in the order of their placeholders in `input_ids`, batch row after batch row;
            pixels: float32 [I, 3, S, S] of `images`, if the images were opened here;
            keys: one per record, in order, batch row after batch row.
        Raises:
            UserError: no record near the batch's can be used.
        """
        packs = [item if isinstance(item, list) else [item] for item in items]
        kept = [[(key, row) for key, row in pack if row.turns] for pack in packs]
        kept = [pack for pack in kept if pack] or [[self._stand_in(packs[-1][-1][0][1])]]
        flat = [item for pack in kept for item in pack]
        rows = [row for _, row in flat]
        batch: dict[str, Any] = dict(collate(rows, [len(pack) for pack in kept]))
        batch["images"] = [image for row in rows for image in row.images]
        batch["keys"] = [key for key, _ in flat]
        pixels = [row.pixels for row in rows if row.pixels is not None]
        return {**batch, "pixels": torch.cat(pixels)} if pixels else batch

    def _stand_in(self, index: int) -> Item:
        """The next record that can be used: a batch must hold one, or the other processes would wait forever."""
        for step in range(1, min(TRIED, len(self))):
            key, row = self.item((index + step) % len(self))
            if row.turns:
                return key, row
        raise UserError(
            f"stage {self.stage.name}: neither record {index} nor one of the next {TRIED} can be used; the reasons are "
            f"in {self.quarantine.folder}. Turns that are too long need a student with higher "
            "max_position_embeddings; repair or remove broken records."
        )
