"""The tensors of a checkpoint folder, one at a time: read from safetensors or PyTorch files, written as safetensors."""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.errors import UserError

SHARD_BYTES = 1 << 30
_LISTED = 50  # names of each kind of misfit in a message
# (index, single file), safest first.
_LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of `folder`, safetensors before PyTorch's.

    Raises:
        UserError: there are none, or the index names a file that is not there.
    """
    for index, single in _LAYOUTS:
        if (folder / index).is_file():
            try:
                places = json.loads((folder / index).read_text())["weight_map"].values()
                names = sorted({str(place) for place in places})
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{folder / index}: not an index of weights ({error}). Copy it again.") from error
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise UserError(
                    f"{folder / index} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
                    "there. Copy the checkpoint again."
                )
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise UserError(
        f"{folder}: no weights found, expected model.safetensors or pytorch_model.bin, whole or in shards with their "
        "index. An adapter (LoRA) must be merged into its base model first."
    )


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a folder."""
    return {name: tuple(tensor.shape) for name, tensor in tensors(folder)}


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a folder with its name, memory-mapped where the file allows it, one file at a time.

    Raises:
        UserError: a file is damaged, or holds more than tensors (nothing else is ever unpickled).
    """
    for path in weight_files(folder):
        yield from _safetensors(path) if path.suffix == ".safetensors" else _pytorch(path)


def _safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (a safe_open cannot be iterated)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}). Copy the checkpoint again.") from error


def _pytorch(path: Path) -> Iterator[tuple[str, Tensor]]:
    mappable = zipfile.is_zipfile(path)  # files of PyTorch < 1.6 are no archives: they are read whole
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: not a file of tensors only ({reason}). Copy the checkpoint again, or take one in safetensors."
        ) from error
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise UserError(f"{path}: a mapping of names to tensors expected, something else found. Take another file.")
    yield from held.items()


def check_fit(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], where: str) -> None:
    """Compare the tensors that a model needs with those that are there, by name and shape.

    Raises:
        UserError: lists what is missing, extra or misshaped.
    """
    both = expected.keys() & found.keys()
    misshaped = (
        f"{name} {list(found[name])} for {list(expected[name])}" for name in both if found[name] != expected[name]
    )
    wrong = {"missing": expected.keys() - found.keys(), "extra": found.keys() - expected.keys(), "misshaped": misshaped}
    lists = []
    for kind, names in ((kind, sorted(names)) for kind, names in wrong.items()):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            lists.append(f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{more}")
    if lists:
        raise UserError(f"{where}: the weights do not fit config.json. {'; '.join(lists)}. Copy the checkpoint again.")


def check_numbers(name: str, tensor: Tensor, where: str) -> None:
    """See that a tensor holds weights.

    Raises:
        UserError: it holds whole numbers (quantized weights), NaN or infinite ones.
    """
    if not tensor.is_floating_point():
        raise UserError(f"{where}: {name} is {tensor.dtype}, not floating point: quantized? Take the original.")
    if not tensor.isfinite().all():
        raise UserError(f"{where}: {name} holds NaN or infinite numbers. Take an earlier checkpoint, or copy it again.")


def counted(
    named: Iterable[tuple[str, Tensor]], numbers: int, progress: Callable[[float, str], None] | None
) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on and tell `progress` the share of all `numbers` that went by, and the tensor's name."""
    done = 0
    for name, tensor in named:
        yield name, tensor
        done += tensor.numel()
        if progress:
            progress(min(1.0, done / numbers), name)


def write_tensors(named: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as safetensors, in shards with an index if they exceed one; at most one shard is in memory.

    Args:
        named: names and tensors, consumed one at a time.
        folder: gets model.safetensors, or model-00001-of-0000N.safetensors and the index.
        shard_bytes: a shard is closed before it would exceed this.
    """
    shard: dict[str, Tensor] = {}
    written: list[tuple[Path, list[str]]] = []
    size = total = 0

    def close() -> None:
        part = folder / f"model-{len(written) + 1:05}.part"
        save_file(shard, part, metadata={"format": "pt"})
        written.append((part, list(shard)))
        shard.clear()

    for name, tensor in named:
        count = tensor.numel() * tensor.element_size()
        if shard and size + count > shard_bytes:
            close()
            size = 0
        shard[name] = tensor.clone(memory_format=torch.contiguous_format)  # not a view of the file it came from
        size, total = size + count, total + count
    close()
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, (part, names) in enumerate(written, 1):
        file = f"model-{number:05}-of-{len(written):05}.safetensors"
        part.rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
