"""Small LLaVA-format data for tests: records of known length, pictures that can be opened and some that cannot."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from distill.config import Stage
from vlm.data.collator import Encoder

IMAGE, BOS, EOS, VISION = 299, 1, 2, 4


class Letters:
    """A tokenizer with one id a character."""

    def encode(self, text: str) -> list[int]:
        """One id a character."""
        return [3 + ord(c) % 250 for c in text]

    def identity(self) -> str:
        """There is one such tokenizer."""
        return "letters"


def encoder(max_length: int = 4096) -> Encoder:
    """An encoder whose images have VISION tokens."""
    return Encoder(Letters(), BOS, EOS, IMAGE, VISION, max_length)


def record(number: int, answer: str, images: int = 1, name: str | None = None) -> dict[str, Any]:
    """A record; its images are named after its number unless `name` says another."""
    files = [name or f"{number}-{place}.png" for place in range(images)]
    row: dict[str, Any] = {
        "id": f"r{number}",
        "conversations": [
            {"from": "human", "value": "<image>" * images + f"what is {number}?"},
            {"from": "gpt", "value": answer},
        ],
    }
    return row | ({"image": files if images > 1 else files[0]} if images else {})


def write(folder: Path, rows: list[Any], name: str = "records.jsonl", broken: tuple[str, ...] = ()) -> Path:
    """Write records and their pictures; those named in `broken` are no pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        files = row.get("image", []) if isinstance(row, dict) else []
        for place, file in enumerate([files] if isinstance(files, str) else files):
            number = int(row["id"][1:])
            if file in broken:
                (folder / file).write_bytes(b"\x89PNG broken")
            elif ".." not in file and not (folder / file).exists():
                Image.new("RGB", (16, 16), (number % 256, 50 * place, 7)).save(folder / file)
    lines = [json.dumps(row) if not isinstance(row, str) else row for row in rows]
    (folder / name).write_text("\n".join(lines))
    return folder / name


def stage(folder: Path, **changes: Any) -> Stage:
    """A stage of the records in a folder."""
    data = {"kind": "llava", "cache": str(folder / "cache"), **changes}
    if not data.get("parts"):
        data = {"records": str(folder / "records.jsonl"), "images": str(folder), **data}
    return Stage(name="s", data=data, steps=1, batch_size=2, learning_rate=1e-3)
