"""Builds a push bundle from the engine's own wheel for that processor and the cross compiler's C and C++ libraries."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from device_bench.devices import _recipe
from device_bench.devices._recipe import RECORD, Recipe
from vlm.errors import UserError
from vlm.folders import sha256, write_atomic
from vlm.runtimes._executorch_library import HARNESS
from vlm.runtimes._executorch_library import RUNNER as RUNNER_NAME

TOOLS = "A cross compiler with its binutils, cmake and make are needed."


def key(recipe: Recipe) -> str:
    """A name for what a bundle is made of: another compiler, source or library gives another one."""
    digest = hashlib.sha256(_run([recipe.compiler, "--version"]).encode())
    for path in [
        HARNESS / "CMakeLists.txt",
        Path(__file__),
        Path(_recipe.__file__),
        *sorted((HARNESS / "src").iterdir()),
    ]:
        digest.update(path.read_bytes())
    for path in sorted(recipe.root.rglob("lib*.so*")) if recipe.root else []:
        digest.update(f"{path} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def make(work: Path, recipe: Recipe) -> Path:
    """Build a bundle below `work` and return its folder.

    Raises:
        UserError: a part cannot be had, or the compiler failed; the message has what it said.
    """
    how, processor, compiler = recipe.how, recipe.processor, recipe.compiler
    recipe.headers()  # before anything is downloaded
    wheel = _wheel(work, recipe)
    libraries = sorted((work / "wheel").glob(how.libraries))
    if not libraries:
        raise UserError(f"{wheel}: no {how.libraries} inside; this version of {how.package} has no C++ runtime.")
    packages = recipe.root / "usr" / "lib" / processor.triplet if recipe.root else None
    runner = _compile(work, recipe, libraries, packages)
    ready = work / "ready"
    ready.mkdir()
    shutil.copy(runner, ready / RUNNER_NAME)
    places = [libraries[0].parent, *([packages] if packages else [])]
    # llama.cpp opens the one of its backends that suits the processor by itself.
    backends = sorted(packages.glob("ggml/backends*/libggml-cpu-*.so")) if packages else []
    for backend in backends:
        _place(backend, ready / backend.name)
    for name in (RUNNER_NAME, processor.loader, *(backend.name for backend in backends)):
        if name == processor.loader:
            _place(_find(name, places, compiler), ready / name)
        else:
            _collect(ready, name, places, compiler)
    record = {
        "abi": recipe.abi,
        "engine": recipe.engine,
        "versions": {how.package: recipe.version, "compiler": _run([compiler, "--version"]).partition("\n")[0]},
        "wheel": {"file": wheel.name, "sha256": sha256(wheel)},
        "files": {path.name: sha256(path) for path in sorted(ready.iterdir())},
    }
    write_atomic(ready / RECORD, json.dumps(record, indent=1) + "\n")
    return ready


def _wheel(work: Path, recipe: Recipe) -> Path:
    package = f"{recipe.how.package}=={recipe.version}"
    platforms = [word for name in recipe.processor.platforms for word in ("--platform", name)]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    _run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(work),
         "--implementation", "cp", "--python-version", python, *platforms, package],
        "Check the network, and that this version exists for that processor.",
    )  # fmt: skip
    wheel = next(work.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "wheel")
    return wheel


def _compile(work: Path, recipe: Recipe, libraries: list[Path], packages: Path | None) -> Path:
    settings, toolchain = [f"-DENGINE={recipe.engine}"], recipe.processor.toolchain
    settings += [
        f"-DCMAKE_TOOLCHAIN_FILE={HARNESS / toolchain}" if toolchain else f"-DCMAKE_CXX_COMPILER={recipe.compiler}"
    ]
    headers = recipe.headers()
    if headers is None:
        settings.append(f"-DCMAKE_PREFIX_PATH={libraries[0].parents[1]}")
    else:
        settings += [f"-DONNXRUNTIME_INCLUDE_DIR={headers}", f"-DONNXRUNTIME_LIBRARY={libraries[0]}"]
    if packages:
        includes = packages.parents[1] / "include"
        settings += [f"-DLLAMACPP_INCLUDE_DIR={includes}", f"-DLLAMACPP_LIBRARY_DIR={packages}"]
    build = work / "build"
    _run(["cmake", "-S", str(HARNESS), "-B", str(build), *settings])
    _run(["cmake", "--build", str(build), "--parallel", "2"])
    return build / RUNNER_NAME


def _collect(ready: Path, name: str, places: list[Path], compiler: str) -> None:
    """Copy every library that a file needs, and those need, from the engine's folders or the compiler's."""
    for needed in _needed(ready / name, compiler):
        if not (ready / needed).exists():
            _place(_find(needed, places, compiler), ready / needed)
            _collect(ready, needed, places, compiler)


def _find(name: str, places: list[Path], compiler: str) -> Path:
    for place in places:
        # A wheel has the library under its full version only.
        if found := [path for path in (place / name, *sorted(place.glob(f"{name}.*"))) if path.is_file()]:
            return found[0]
    return Path(_run([compiler, f"-print-file-name={name}"]))


def _place(source: Path, to: Path) -> None:
    if not source.is_file():
        raise UserError(
            f"{to.name}: needed by the runner, found neither in the engine's wheel nor beside the compiler."
        )
    shutil.copy(source.resolve(), to)


def _needed(path: Path, compiler: str) -> list[str]:
    readelf = re.sub(r"g\+\+[^/]*$", "readelf", compiler)
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _run([readelf, "-d", str(path)]))


def _run(command: list[str], advice: str = TOOLS) -> str:
    """What a program prints.

    Raises:
        UserError: it is not there or failed; the message has what it said last, and the advice.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror or error}. {advice}") from error
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise UserError(f"`{' '.join(command[:4])} ...` ended with {done.returncode}.\n{tail}\n{advice}")
    return done.stdout.strip()
