"""Reads the rows of question and answer files as people have them: .jsonl, .json, .tsv, .csv, .xlsx."""

import csv
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any
from xml.etree import ElementTree

from vlm.errors import UserError

Row = dict[str, Any]
TABLE = ".tsv"
UTF_8 = "utf-8-sig"  # with or without a byte order mark
PREDICTION, TRUTH, INDEX = "prediction", "answer", "index"  # VLMEvalKit's columns
SAID = ("text", PREDICTION, "pred")  # a model's null or NaN in them is an empty answer, elsewhere an absent value
# What LLaVA's and VLMEvalKit's scripts see as an empty cell, because pandas reads their tables.
EMPTY_CELLS = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
# Folders of pictures: never searched for question files, they hold tens of thousands of names.
PICTURES = {"images", "val2014", "train_images", "test_images", "answers", "answers_upload"}
DEPTH = 4  # folders below --data in which a question file is looked for
_SHEET = "xl/worksheets/sheet1.xml"
_STRINGS = "xl/sharedStrings.xml"
_XLSX = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def find(data: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` (in their order, any case) that lies in `data` or up to DEPTH folders below it."""
    if data.suffix == TABLE and data.is_file() and any(name.endswith(TABLE) for name in names):
        return data  # a table by its own name
    for name in names:
        for folder in folders(data):
            found = [path for path in _files(folder) if path.name.lower() == name.lower()]
            if found:
                return found[0]
    return None


def need(data: Path, names: Sequence[str], what: str) -> Path:
    """`find`, or the error that says what is missing.

    Raises:
        UserError: none of the names lies there.
    """
    found = find(data, names)
    if found is None:
        raise UserError(
            f"{data}: no {' or '.join(names)} here or up to {DEPTH} folders below. Give the folder that holds "
            f"{what} with --data (docs/benchmarks.md has the layouts)."
        )
    return found


def folders(data: Path) -> list[Path]:
    """`data` and the folders up to DEPTH below it, nearest first; none of pictures."""
    if data.is_file():
        return [data.parent]
    level, found = [data] if data.is_dir() else [], []
    for _ in range(DEPTH + 1):
        found += level
        level = [path for folder in level for path in _entries(folder) if path.is_dir() and path.name not in PICTURES]
    return found


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _files(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_file()]


def text_of(row: Row, names: Sequence[str], place: str) -> str:
    """The first of some columns that the row has, as text.

    Raises:
        UserError: it has none of them; names file and row.
    """
    for name in names:
        value = row.get(name)
        if value is not None:
            return str(int(value) if isinstance(value, float) and value.is_integer() else value)
    raise UserError(
        f"{place}: no {' or '.join(repr(name) for name in names)} in this row (it has {', '.join(map(repr, row))}). "
        "Is this an answer file of the benchmark given with --tasks?"
    )


def answer_of(row: Row, names: Sequence[str], place: str) -> str:
    """`text_of` a column of answers, which are texts or, where a program took them for such, numbers.

    Raises:
        UserError: the row has none, or it is a list, an object, true or false.
    """
    value = next((row[name] for name in names if row.get(name) is not None), "")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(
            f"{place}: the answer is {json.dumps(value)}, a text was expected. Write the model's words as they are."
        )
    return text_of(row, names, place)


def id_of(row: Row, names: Sequence[str], place: str) -> str:
    """`text_of` a column of ids: pandas writes whole numbers as 3.0 where a cell of the column is empty."""
    return text_of(row, names, place).removesuffix(".0")


def read_rows(path: Path) -> list[Row]:
    """Every row of a file; a .json file may be a list, or an object whose values are the rows.

    Raises:
        UserError: the file is missing, damaged, or holds no rows; names the line where there is one.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Correct the path of --predictions or --data.")
    readers: dict[str, Callable[[Path], Iterable[Row]]] = {
        ".tsv": lambda file: (row for row, _ in tsv_rows(file)),
        ".csv": lambda file: (row for row, _ in tsv_rows(file, ",")),
        ".xlsx": _xlsx_rows,
    }
    try:
        return list(readers.get(path.suffix.lower(), _json_rows)(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8 ({error}). Download or write the file again.") from error


def read_json(path: Path) -> Any:
    """A whole JSON file.

    Raises:
        UserError: missing or not JSON.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Correct the path of --predictions or --data.")
    try:
        return json.loads(path.read_text(encoding=UTF_8))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}). Download or write the file again.") from error


def _json_rows(path: Path) -> Iterator[Row]:
    """JSON lines or one tree: POPE's labels are lines in a .json file, LLaVA's result is a tree in a .jsonl file."""
    text = path.read_text(encoding=UTF_8)
    # Not splitlines: an answer may hold a line separator that is none of JSON lines.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if isinstance(tree, dict) and (answers := _answers_by_id(tree)):
        named = enumerate(answers.items(), 1)
        yield from (_object(path, number, {"question_id": name, "text": said}) for number, (name, said) in named)
        return
    if tree is None or (isinstance(tree, dict) and not any(isinstance(part, list) for part in tree.values())):
        yield from (_object(path, number, _json_line(path, number, line)) for number, line in lines)
        return
    rows = [row for part in tree.values() if isinstance(part, list) for row in part] if isinstance(tree, dict) else tree
    yield from (_object(path, number, row) for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1))


def _answers_by_id(tree: Row) -> dict[str, Any]:
    """Of a ScienceQA result: LLaVA's `outputs`, else the `results` of ScienceQA's own script, places from 0 or -1."""
    outputs, results = tree.get("outputs"), tree.get("results")
    if isinstance(outputs, dict):
        return outputs
    if isinstance(results, dict) and all(isinstance(place, int) for place in results.values()):
        return {name: ascii_uppercase[place] if place >= 0 else "" for name, place in results.items()}
    return {}


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{path}:{number}: not a JSON line ({error}). Write the answers again, one object a line."
        ) from error


def _object(path: Path, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            f"{path}:{number}: a JSON object was expected, found {type(row).__name__}. "
            "Write the answers again, one object a line."
        )
    row = {name: _whole(value) if isinstance(value, str) else value for name, value in row.items()}
    null = {name for name, value in row.items() if value is None or value != value}  # NaN is not itself
    return {name: "" if name in null else value for name, value in row.items() if name in SAID or name not in null}


def _whole(text: str) -> str:
    """Half a surrogate pair, which an answer cut within a character may end in, cannot be written to any file."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def tsv_rows(path: Path, delimiter: str = "\t") -> Iterator[tuple[Row, tuple[int, int]]]:
    """Rows of a table with a header, each with the bytes of the file it stands in; empty cells are left out."""
    csv.field_size_limit(sys.maxsize)  # a picture in base64 is one cell
    position = 0

    def lines() -> Iterator[str]:
        nonlocal position
        with path.open("rb") as file:
            for line in file:
                position += len(line)
                yield line.decode(UTF_8 if position == len(line) else "utf-8")

    reader = csv.reader(lines(), delimiter=delimiter)
    header = next(reader, [])
    start = position
    for cells in reader:
        if cells:
            row = {name: cell for name, cell in zip(header, cells, strict=False) if cell != ""}
            yield row, (start, position)
        start = position


def tsv_row(path: Path, start: int, end: int) -> Row:
    """One row of a table, from the bytes that `tsv_rows` said."""
    csv.field_size_limit(sys.maxsize)
    with path.open("rb") as file:
        header = file.readline().decode(UTF_8)
        file.seek(start)
        text = file.read(end - start).decode("utf-8")
    names, cells = next(csv.reader([header], delimiter="\t")), next(csv.reader([text], delimiter="\t"))
    return dict(zip(names, cells, strict=False))


def _xlsx_rows(path: Path) -> Iterator[Row]:
    """Rows of a workbook's first sheet, with the header's names; the format is a zip of XML (ECMA-376)."""
    try:
        with zipfile.ZipFile(path) as archive:
            strings = _shared_strings(archive)
            sheet = ElementTree.fromstring(archive.read(_SHEET))
    except (zipfile.BadZipFile, KeyError, ElementTree.ParseError) as error:
        raise UserError(f"{path}: not a readable .xlsx workbook ({error}). Save it again, or as .tsv.") from error
    header: dict[str, str] = {}
    for row in sheet.iter(f"{_XLSX}row"):
        cells = {_column(cell): _cell(cell, strings) for cell in row.iter(f"{_XLSX}c")}
        if not header:
            header = {column: value for column, value in cells.items() if value}
        else:
            named = {header[column]: value for column, value in cells.items() if column in header and value != ""}
            if named:
                yield named


def _shared_strings(archive: zipfile.ZipFile) -> list[str]:
    if _STRINGS not in archive.namelist():
        return []
    table = ElementTree.fromstring(archive.read(_STRINGS))
    return [_texts(item) for item in table.iter(f"{_XLSX}si")]


def _column(cell: ElementTree.Element) -> str:
    return cell.get("r", "").rstrip("0123456789")


def _cell(cell: ElementTree.Element, strings: list[str]) -> str:
    value = cell.findtext(f"{_XLSX}v", "")
    if cell.get("t") == "s" and value:
        return strings[int(value)]
    if cell.get("t") == "inlineStr":
        return _texts(cell)
    if cell.get("t") == "n" or cell.get("t") is None:
        return value.removesuffix(".0")
    return {"1": "True", "0": "False"}.get(value, value) if cell.get("t") == "b" else value


def _texts(element: ElementTree.Element) -> str:
    """The text of a string item: plain, or in runs of different fonts; phonetic hints (rPh) are no part of it."""
    runs = [element, *element.iter(f"{_XLSX}is"), *element.iter(f"{_XLSX}r")]
    return "".join(text.text or "" for run in runs for text in run.findall(f"{_XLSX}t"))
