"""Lazy plug-in lookup: a package's modules are its entries, so a new format, engine or benchmark is a new file."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from vlm.errors import UserError


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean ...?' for the closest of `known`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def names(package: str) -> list[str]:
    """List the entries of `package` without importing them; `base` and names with a leading underscore are none."""
    root = importlib.import_module(package)
    found = (module.name for module in pkgutil.iter_modules(root.__path__))
    return sorted(name for name in found if not name.startswith("_") and name != "base")


def require(package: str, name: str) -> None:
    """See that `package` has an entry `name`, without importing it.

    Raises:
        UserError: there is no such entry; the message lists those there are.
    """
    known = names(package)
    if name not in known:
        kind = package.rsplit(".", 1)[-1].rstrip("s")
        raise UserError(f"unknown {kind} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def load(package: str, name: str) -> ModuleType:
    """Import entry `name` of `package`; raises as `require` does."""
    require(package, name)
    return importlib.import_module(f"{package}.{name}")
