"""Which products of a run still hold, and building those that do not; a kill at any moment costs one step at most.

A product's stamp, stages/<name>.json, and what lies at its paths tell its state:

| state | stamp | what `why` says | what `build` does first |
|---|---|---|---|
| not built | none, or unreadable | not built yet | clears what lies at its path |
| stale | names other inputs than it has now | ... changed | clears |
| begun | same inputs, not finished | interrupted | keeps everything: the stage goes on from its .partial folder |
| gone | finished, a path is missing | ... is gone | clears |
| holds | finished, same inputs, all paths there | None | nothing |

The inputs are hashes of configuration, files and code, and of each upstream product the id of its building, so that a
product built anew makes all that depends on it stale. `build` makes a product begun before the stage runs and finished
after it; one whose stage fails its check stays begun and is tried again by the next call. A begun product whose path
exists was finished by a run that was killed before it said so: stages rename their folder last.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.stamps import Stamp, finish, new_stamp, read_stamp, write_stamp

_NAMED = 3  # changes that a reason lists
OnProgress = Callable[[float, str], None]  # fraction done from 0 to 1, and what is being done


@dataclass(frozen=True)
class Product:
    """One thing a step leaves behind: a folder, or a file with others beside it.

    Attributes:
        name: unique in the run; its stamp is stages/<name>.json.
        inputs: hashes of what it is made from, without upstream products.
        needs: names of the upstream products.
        path: where it will lie; None when only the step knows.
    """

    name: str
    inputs: dict[str, str]
    needs: tuple[str, ...] = ()
    path: Path | None = None


@dataclass(frozen=True)
class Step:
    """One call of a stage.

    Attributes:
        title: what is shown while it runs.
        products: what it leaves behind, in the order in which `build` returns their paths.
        build: makes those products that do not exist and keeps those that do.
        expected_s: wall time on two cores if it was never measured here.
        tolerant: runs even when a step it needs failed its check; it then works with what there is.
    """

    title: str
    products: tuple[Product, ...]
    build: Callable[[OnProgress], list[Path]]
    expected_s: float
    tolerant: bool = False


class Ledger:
    """The stamps of one run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.stages = run_dir / "stages"

    def stamp(self, name: str) -> Stamp | None:
        """Read a product's stamp."""
        return read_stamp(self.stages / f"{name}.json")

    def pending(self, steps: Iterable[Step]) -> dict[str, str]:
        """Return product name -> why it must be built, for all products that must; changes nothing."""
        reasons: dict[str, str] = {}
        for step in steps:
            for product in step.products:
                if reason := self.why(product, reasons):
                    reasons[product.name] = reason
        return reasons

    def why(self, product: Product, rebuilt: Iterable[str] = ()) -> str | None:
        """Say why `product` must be built, given upstream products that will be; None when it holds."""
        if upstream := [name for name in product.needs if name in rebuilt]:
            return f"{upstream[0]} is new"
        stamp = self.stamp(product.name)
        if stamp is None:
            return "not built yet"
        if changed := self._changed(stamp, product):
            more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
            return f"{', '.join(changed[:_NAMED])}{more} changed"
        if stamp.finished is None:
            return "interrupted"
        missing = [path for path in stamp.paths if not (self.run_dir / path).exists()]
        return f"{missing[0]} is gone" if missing else None

    def expected_s(self, step: Step) -> float:
        """Seconds that `step` will take: what it took last time here, else what it took where it was written."""
        measured = [stamp.seconds for p in step.products if (stamp := self.stamp(p.name)) and stamp.seconds]
        return max(measured, default=step.expected_s)

    def build(self, step: Step, on_progress: OnProgress) -> float | None:
        """Build the products of `step` that do not hold.

        Returns:
            Seconds it took; None when everything was there, finished by a run that was killed before it said so.
        """
        stamps = {product.name: self._begin(product) for product in step.products if self.why(product)}
        paths, seconds = [product.path for product in step.products if product.path], None
        if len(paths) < len(step.products) or not all(path.exists() for path in paths):
            start = time.monotonic()
            paths = step.build(on_progress)
            seconds = round(time.monotonic() - start, 2)
        for product, path in zip(step.products, paths, strict=True):
            if product.name in stamps:
                relative = path.relative_to(self.run_dir).as_posix()
                self._write(product.name, finish(stamps[product.name], [relative], seconds))
        return seconds

    def discard(self, product: Product) -> None:
        """Delete a product and its stamp."""
        stamp = self.stamp(product.name)
        paths = {self.run_dir / path for path in (stamp.paths if stamp else [])}
        for path in paths | ({product.path} if product.path else set()):
            _remove(path)
        (self.stages / f"{product.name}.json").unlink(missing_ok=True)

    def _begin(self, product: Product) -> Stamp:
        """Record the beginning; keep what a begun building from the same inputs left, clear anything else."""
        old = self.stamp(product.name)
        begun = old is not None and old.finished is None and not self._changed(old, product)
        if not begun:
            self.discard(product)
        stamp = new_stamp(self._wanted(product))
        self._write(product.name, stamp)
        return stamp

    def _wanted(self, product: Product) -> dict[str, str]:
        upstream = {name: stamp.build for name in product.needs if (stamp := self.stamp(name))}
        return {**product.inputs, **upstream}

    def _changed(self, stamp: Stamp, product: Product) -> list[str]:
        wanted = self._wanted(product)
        return sorted(key for key in {*wanted, *stamp.inputs} if wanted.get(key) != stamp.inputs.get(key))

    def _write(self, name: str, stamp: Stamp) -> None:
        write_stamp(self.stages / f"{name}.json", stamp)


def _remove(path: Path) -> None:
    """Delete a folder and what an interrupted run left of it, or a file and those that belong to it (x.json: x.*)."""
    folders = [folder for folder in (path, path.with_name(path.name + ".partial")) if folder.is_dir()]
    for folder in folders:
        shutil.rmtree(folder)
    if not folders and path.suffix:
        for file in path.parent.glob(f"{path.stem}.*"):
            file.unlink()
