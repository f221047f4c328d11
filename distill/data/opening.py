"""From the configuration of a stage's data to its records."""

from collections.abc import Callable, Sequence
from pathlib import Path

from distill.data.config import Data, Part, missing, refuse
from vlm.data.collator import Encoder
from vlm.data.records import Record, scene_captions, scene_conversations
from vlm.data.store import Conversations, MeasuredFile
from vlm.errors import UserError
from vlm.folders import cache_folder

Progress = Callable[[str, float], None]  # what is being done, and the share done from 0 to 1

COUNT_TOLERANCE = 0.05  # published counts are rounded


def open_data(data: Data, encoder: Encoder, stage: str, progress: Progress | None = None) -> Sequence[Record]:
    """The records of a stage; llava's are indexed and measured at the first use.

    Args:
        data: the stage's data.
        encoder: what the records are measured with.
        stage: name of the stage, for messages.
        progress: is told while records are indexed and measured.
    Raises:
        UserError: lists every file and folder that is missing, or every part whose count or images are wrong; or no
            record can be used.
    """
    if data.kind != "llava":
        make = scene_captions if data.kind == "scene_captions" else scene_conversations
        return make(data.start, data.count)
    refuse({stage: missing(data)})
    cache = Path(data.cache) if data.cache else cache_folder() / "records"
    template, tell = data.template or "v1", progress or (lambda what, share: None)
    parts = data.all_parts()
    files = [
        MeasuredFile(part.name, Path(part.records), Path(part.images), encoder, template, cache, tell) for part in parts
    ]
    refuse({stage: [problem for part, file in zip(parts, files, strict=True) for problem in _wrong(part, file)]})
    limit = min(data.max_length or encoder.max_length, encoder.max_length)
    records = Conversations(files, limit)
    if not len(records):
        examples = "".join(
            f"\n  {broken.part}, record {broken.record}: {broken.reason}" for broken in records.broken[:5]
        )
        raise UserError(
            f"stage {stage}: none of {records.total} records can be used: {sum(records.too_long.values())} are longer "
            f"than {limit} tokens, {len(records.broken)} are broken. Raise max_length of the stage's data and the "
            f"student's max_position_embeddings, or correct the records.{examples}"
        )
    return records


def _wrong(part: Part, file: MeasuredFile) -> list[str]:
    """What speaks against these being the records and the images that are meant."""
    found, count = [], len(file.lengths)
    if part.count and abs(count - part.count) > COUNT_TOLERANCE * part.count:
        found.append(f"{part.name}: {part.records}: {count} records found, about {part.count} expected")
    looked_for, absent = file.images_not_found()
    if 2 * len(absent) > looked_for:
        found.append(
            f"{part.name}: {absent[0]}: no such image; of {looked_for} that were looked for {len(absent)} are missing"
        )
    return found
