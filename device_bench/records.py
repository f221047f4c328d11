"""The graded answers of a run as one Parquet file: a row per sample, and what the run was in the file's metadata."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from device_bench.evaluate import load_answers, save_answers
from device_bench.tasks.base import Sample
from vlm.errors import UserError, install_hint

PARQUET = ".parquet"
HEADER = b"pocketvlm"


def write_records(samples: Sequence[Sample], path: Path, header: dict[str, Any]) -> None:
    """Write samples whole or not at all: Parquet (zstd), or JSON lines where the name ends in .jsonl.

    Args:
        samples: in the order of the benchmark.
        path: the file; its folder is made.
        header: what was asked of which model; kept in the Parquet file's metadata.
    Raises:
        UserError: pyarrow is not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != PARQUET:
        save_answers(samples, path)
        return
    pyarrow, parquet = _arrow(path)
    rows = [{**vars(sample), "truth": _listed(sample.truth), "options": list(sample.options)} for sample in samples]
    table = pyarrow.Table.from_pylist(rows)
    temporary = path.with_name(path.name + ".partial")
    parquet.write_table(table.replace_schema_metadata({HEADER: json.dumps(header)}), temporary, compression="zstd")
    os.replace(temporary, path)


def read_records(path: Path) -> list[Sample]:
    """Read what `write_records` wrote.

    Raises:
        UserError: the file is missing or none of ours.
    """
    if path.suffix != PARQUET:
        return load_answers(path)
    pyarrow, parquet = _arrow(path)
    if not path.is_file():
        raise UserError(f"{path}: no such answers file. Run the benchmark again: pocketvlm eval.")
    try:
        rows = parquet.read_table(path).to_pylist()
        return [Sample(**{**row, "truth": _truth(row["truth"]), "options": tuple(row["options"])}) for row in rows]
    except (pyarrow.ArrowException, TypeError, KeyError) as error:
        raise UserError(f"{path}: not one of our answer files ({error}). Run the benchmark again.") from error


def read_header(path: Path) -> dict[str, Any]:
    """What was asked of which model, from a Parquet file's metadata; {} for JSON lines, which have no place for it."""
    if path.suffix != PARQUET:
        return {}
    metadata = _arrow(path)[1].read_schema(path).metadata or {}
    header: dict[str, Any] = json.loads(metadata.get(HEADER, b"{}"))
    return header


def is_ours(path: Path) -> bool:
    """Whether a file holds answers that this program wrote, told by its first line."""
    if path.suffix == PARQUET:
        return True
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.readline(100_000)
    return '"family"' in start and '"parsed"' in start


def _listed(truth: str | tuple[str, ...]) -> list[str]:
    return [truth] if isinstance(truth, str) else list(truth)


def _truth(values: list[str]) -> str | tuple[str, ...]:
    return values[0] if len(values) == 1 else tuple(values)


def _arrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{path}: Parquet needs pyarrow. Type: {install_hint('eval')}, or name a .jsonl file."
        ) from error
    return pyarrow, parquet
