"""Where a benchmark's pictures are: files beside its questions, or cells of a table in base64."""

import base64
import binascii
import hashlib
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from device_bench.rows import INDEX, Row, tsv_row, tsv_rows
from vlm.data.records import load_image
from vlm.errors import UserError

TABLE = "table:"
THUMBNAIL = 160
QUALITY = 85  # of JPEG
LONGEST_INDEX = 64  # characters; a shorter cell names the row whose picture it shares (VLMEvalKit)


def load_picture(reference: str) -> Image.Image:
    """The picture that a benchmark's question refers to, RGB.

    Raises:
        UserError: the file or the table's cell is missing or no picture.
    """
    if not reference.startswith(TABLE):
        return load_image(reference)
    path, _, place = reference.removeprefix(TABLE).rpartition("#")
    start, _, end = place.partition("-")
    cell = tsv_row(Path(path), int(start), int(end)).get("image", "")
    try:
        with Image.open(io.BytesIO(base64.b64decode(cell))) as image:
            return image.convert("RGB")
    except (binascii.Error, UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"{path}: the picture at bytes {place} is unreadable ({error}). Download it again.") from error


def table_of(reference: str) -> Path | None:
    """The table that holds a picture, None for a picture elsewhere."""
    return Path(reference.removeprefix(TABLE).rpartition("#")[0]) if reference.startswith(TABLE) else None


@cache
def md5(path: Path) -> str:
    """A file's MD5, by which VLMEvalKit publishes its tables."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def thumbnail(reference: str) -> str:
    """A picture as a data URI, at most THUMBNAIL pixels wide and high.

    Raises:
        UserError: the picture is missing or unreadable.
    """
    image = load_picture(reference)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(image)


def data_uri(image: Image.Image, kind: str = "JPEG") -> str:
    """A picture as text that a page can hold; `kind` is PIL's name of a format."""
    file = io.BytesIO()
    image.save(file, kind, quality=QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def table_rows(path: Path) -> list[tuple[Row, str]]:
    """A VLMEvalKit table's rows without their pictures, each with the reference of its picture.

    Equal pictures have one reference, whichever row they stand in; "" where a row has none.
    """
    rows: list[tuple[Row, str]] = []
    by_content: dict[bytes, str] = {}
    by_index: dict[str, str] = {}
    for row, (start, end) in tsv_rows(path):
        cell = row.pop("image", "")
        if len(cell) > LONGEST_INDEX:
            reference = f"{TABLE}{path}#{start}-{end}"
            by_index[row[INDEX]] = by_content.setdefault(hashlib.sha256(cell.encode()).digest(), reference)
        elif cell:
            by_index[row[INDEX]] = cell
        rows.append((row, row.get(INDEX, "")))
    return [(row, by_index.get(found := by_index.get(index, ""), found)) for row, index in rows]


def picture_folder(places: Sequence[Path], names: Sequence[str]) -> Path:
    """The first of some folders that holds the first of `names`, else the first that exists, else the first."""
    first = names[0] if names else ""
    holding = (folder for folder in places if first and (folder / first).is_file())
    existing = (folder for folder in places if folder.is_dir())
    return next(holding, next(existing, places[0]))
