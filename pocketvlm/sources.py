"""Code versions: one hash over the sources that a step really uses, found by following import statements."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOMS = ("vlm", "distill", "export", "device_bench", "pocketvlm")
# Modules that compile a folder of C++ sources, beside the rooms.
NATIVE = {"vlm.runtimes._executorch_library": "android_harness"}


def code_version(entries: Iterable[str]) -> str:
    """Return one SHA-256 over every module of this project reachable from `entries`, and the data files beside them.

    Args:
        entries: module names; what is only loaded by name (formats, engines, losses) must be among them.
    """
    digest = hashlib.sha256()
    for path in sorted({file for module in reachable(entries) for file in _files(module)}):
        digest.update(f"{path.name}\0{file_hash(path)}\n".encode())
    return digest.hexdigest()


@cache
def file_hash(path: Path) -> str:
    """Return a source file's SHA-256, read once: what a process runs is what it read when it began."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reachable(entries: Iterable[str]) -> set[str]:
    """Return the modules of this project that `entries` import, directly or not, lazily or not, themselves included."""
    found: set[str] = set()
    waiting = list(entries)
    while waiting:
        module = waiting.pop()
        if module in found or source(module) is None:
            continue
        found.add(module)
        parts = module.split(".")
        waiting += [".".join(parts[:length]) for length in range(1, len(parts))]
        waiting += imports(module)
    return found


@cache
def imports(module: str) -> tuple[str, ...]:
    """Return every module name that the import statements of `module` may mean, wherever in the file they stand."""
    path = source(module)
    if path is None:
        return ()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(names)


@cache
def source(module: str) -> Path | None:
    """Return the file of a module of this project; None for any other module and for one that does not exist."""
    room, *rest = module.split(".")
    root = _root(room) if room in ROOMS else None
    if root is None:
        return None
    base = root.joinpath(*rest)
    candidates = (base / "__init__.py", base.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


def entries_of(package: str) -> list[str]:
    """Return the full names of a plug-in package's modules, for `code_version`, without importing them."""
    init = source(package)
    return [] if init is None else sorted(f"{package}.{path.stem}" for path in init.parent.glob("[a-z]*.py"))


def constant(module: str, name: str) -> str | None:
    """Read a module-level string constant from the source, without importing the module (which may bring in torch)."""
    path = source(module)
    for node in ast.parse(path.read_text()).body if path else []:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Constant):
            continue
        if any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
            return str(node.value.value)
    return None


@cache
def _root(room: str) -> Path | None:
    spec = importlib.util.find_spec(room)
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


def _files(module: str) -> list[Path]:
    path = source(module)
    if path is None:
        return []
    beside = (p for p in path.parent.iterdir() if p.is_file() and p.suffix not in {".py", ".pyc"} and p.name[0] != ".")
    return [path, *beside, *_native_files(module)]


def _native_files(module: str) -> list[Path]:
    path = source(module)
    if module not in NATIVE or path is None:
        return []
    folder = path.parents[module.count(".")] / NATIVE[module]
    return [p for p in folder.rglob("*") if p.suffix in {".cpp", ".h", ".txt"}]
