"""Builds android_harness (the C++ side of the ExecuTorch engine) once per source and wheel, without importing either.

The Python package `executorch` imports torch; its shared libraries do not need it. So the engine is a small C++ library
linked against the wheel's libexecutorch.so, compiled on first use (seconds) and kept in a cache folder.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

from vlm.errors import UserError, install_hint
from vlm.folders import cache_folder

HARNESS = Path(__file__).resolve().parents[2] / "android_harness"
LIBRARY = "libpocketvlm_executorch.so"
RUNNER = "pocketvlm-runner"


def build() -> Path:
    """Return the folder with `LIBRARY` and `RUNNER`, built now if the cache does not have them.

    Raises:
        UserError: the wheel is missing or too old, the sources, CMake or a compiler are missing, or compiling fails.
    """
    sdk = find_sdk()
    if not HARNESS.is_dir():
        raise UserError(f"{HARNESS}: missing; the ExecuTorch engine is compiled from it. Use a clone of the project.")
    folder = cache_folder() / f"executorch-{_key(sdk)}"
    if not (folder / LIBRARY).is_file():
        _build_into(folder, sdk)
    return folder


def find_sdk() -> Path:
    """Return the installed ExecuTorch package with its C++ runtime, without importing it (that would import torch).

    Raises:
        UserError: it is not installed, or its version has no C++ runtime.
    """
    spec = importlib.util.find_spec("executorch")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or []]
    if not places:
        raise UserError(f"the executorch engine needs the executorch package: {install_hint('executorch')}.")
    for place in places:
        if (place / "lib" / "libexecutorch.so").is_file():
            return place
    raise UserError(
        f"{places[0]}: no lib/libexecutorch.so; executorch has it from 1.5 on: {install_hint('executorch')}."
    )


def _key(sdk: Path) -> str:
    """Name a build by everything that goes into it: the sources, the wheel's place and the wheel's libraries."""
    digest = hashlib.sha256(str(sdk).encode())
    for path in [HARNESS / "CMakeLists.txt", *sorted((HARNESS / "src").iterdir())]:
        digest.update(path.read_bytes())
    for path in sorted((sdk / "lib").glob("*.so")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _build_into(folder: Path, sdk: Path) -> None:
    """Compile beside `folder` and rename, so that a killed or a second concurrent build leaves nothing half-made."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise UserError("cmake: not found; the executorch engine is compiled on first use: apt install cmake g++ make.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as name:
        work, ready = Path(name) / "build", Path(name) / "ready"
        _run([cmake, "-S", str(HARNESS), "-B", str(work), f"-DCMAKE_PREFIX_PATH={sdk}"])
        _run([cmake, "--build", str(work), "--parallel", "2"])
        ready.mkdir()
        for built in (LIBRARY, RUNNER):
            shutil.move(work / built, ready / built)
        try:
            ready.rename(folder)
        except OSError:
            if not (folder / LIBRARY).is_file():  # else another process was faster, and its build is as good
                raise


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise UserError(
            f"{HARNESS}: compiling the executorch engine failed (`{' '.join(command)}` ended with {done.returncode}).\n"
            f"{tail}\nA C++17 compiler and make are needed: apt install cmake g++ make."
        )
