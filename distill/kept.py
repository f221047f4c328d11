"""What is computed once and read again: kept in memory, and in a file, so that a resumed run reads the same numbers.

A frozen model's result for a record depends, in its last bits, on the batch it was computed in. A run that went on
after its first epoch without these numbers would compute them in other batches and train to other weights.
"""

import json
import zlib
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEMORY = 2**30  # bytes of a store


class Kept:
    """Key -> float16 tensor, up to a number of entries and of bytes.

    Args:
        entries: highest number of entries.
        file: where they are kept too; what a complete write left there is read. None: in memory only.
        memory: highest number of bytes.
    """

    def __init__(self, entries: int, file: Path | None = None, memory: int = MEMORY) -> None:
        self.entries, self.file, self.memory = entries, file, memory
        self.bytes = 0
        self._values: dict[Hashable, Tensor] = {}
        if file is not None and file.is_file():
            self._read(file)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __getitem__(self, key: Hashable) -> Tensor:
        return self._values[key]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, computed: Mapping[Any, Tensor]) -> None:
        """Keep what was computed together, as far as there is room; in the file all of it or nothing."""
        room = self.entries - len(self._values)
        size = sum(value.nbytes for value in computed.values())
        if room <= 0 or not computed or self.bytes + size > self.memory:
            return
        group = dict(list(computed.items())[:room])
        self._values |= group
        self.bytes += size
        if self.file is not None:
            self._write(self.file, group)

    def _write(self, file: Path, group: dict[Hashable, Tensor]) -> None:
        data = b"".join(value.contiguous().numpy().tobytes() for value in group.values())
        head = {"keys": list(group), "shapes": [list(value.shape) for value in group.values()], "crc": zlib.crc32(data)}
        with file.open("ab") as stream:
            stream.write(json.dumps(head).encode() + b"\n" + data)

    def _read(self, file: Path) -> None:
        """Read group after group; the first that is not whole, and what follows, is cut off."""
        with file.open("r+b") as stream:
            while True:
                start = stream.tell()
                try:
                    head = json.loads(stream.readline())
                    sizes = [torch.Size(shape).numel() for shape in head["shapes"]]
                    data = bytearray(stream.read(2 * sum(sizes)))
                    whole = len(data) == 2 * sum(sizes) and zlib.crc32(data) == head["crc"]
                except ValueError:
                    whole = False
                if not whole:
                    stream.truncate(start)
                    return
                if sizes and sum(sizes):
                    parts = torch.frombuffer(data, dtype=torch.float16).split(sizes)
                    for key, shape, part in zip(head["keys"], head["shapes"], parts, strict=True):
                        self._values[tuple(key) if isinstance(key, list) else key] = part.view(shape)
                self.bytes += len(data)
