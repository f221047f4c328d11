"""The push bundle: loader, C library, engine and runner for another processor, so that a device needs nothing.

Made from public packages: the engine's own wheel for that processor (the version that is installed here), and the
cross compiler's C and C++ libraries. Kept in the cache under a name made from all that goes into it.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vlm.errors import UserError, install_hint
from vlm.folders import cache_folder, sha256, write_atomic
from vlm.runtimes._executorch_library import HARNESS
from vlm.runtimes._executorch_library import RUNNER as RUNNER_NAME

RECORD = "bundle.json"


@dataclass(frozen=True)
class Engine:
    """How a runner is built.

    Attributes:
        package: the wheel with its libraries.
        libraries: which of the unpacked wheel's files they are.
        model: what the job calls the model, below the artifact's folder.
        needs_root: it also needs a folder of the device's packages, which LLAMACPP_ROOT names: llama.cpp has no wheel.
    """

    package: str
    libraries: str
    model: tuple[str, ...] = ()
    needs_root: bool = False


@dataclass(frozen=True)
class Processor:
    """What a bundle for one processor is made with."""

    compiler: str
    package: str  # of Debian and Ubuntu
    loader: str
    triplet: str
    platforms: tuple[str, ...]  # of wheels


ENGINES = {
    "executorch": Engine("executorch", "executorch/lib/libexecutorch*.so", ("model.pte",)),
    "onnx": Engine("onnxruntime", "onnxruntime/capi/libonnxruntime.so.*"),
    "llamacpp": Engine("onnxruntime", "onnxruntime/capi/libonnxruntime.so.*", needs_root=True),
}
LLAMACPP_ROOT = "LLAMACPP_ROOT"
OWN_RUNNERS = "POCKETVLM_RUNNERS"
PROCESSORS = {
    "arm64-v8a": Processor(
        "aarch64-linux-gnu-g++",
        "g++-aarch64-linux-gnu",
        "ld-linux-aarch64.so.1",
        "aarch64-linux-gnu",
        ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"),
    ),
}
ONNXRUNTIME_HEADERS = "ONNXRUNTIME_HEADERS"
HEADER = "onnxruntime_c_api.h"
HEADER_PLACES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime")


@dataclass(frozen=True)
class Bundle:
    """A finished bundle: its files by name, and how to start its runner where they lie; loader "" is the system's."""

    engine: str
    folder: Path
    files: dict[str, Path]
    loader: str
    model: tuple[str, ...]

    def command(self, place: str) -> list[str]:
        """The words that start the runner from the folder `place` of the device."""
        loader = [f"{place}/{self.loader}", "--library-path", place] if self.loader else []
        return [*loader, f"{place}/{RUNNER_NAME}"]


def own_bundle(engine: str) -> Bundle | None:
    """What the user has built, for example with Android's NDK: a runner that finds its libraries beside it; or None.

    Raises:
        UserError: $POCKETVLM_RUNNERS is set and has no runner of this engine.
    """
    chosen = os.environ.get(OWN_RUNNERS)
    if not chosen:
        return None
    folder = Path(chosen) / engine
    if not (folder / RUNNER_NAME).is_file():
        raise UserError(
            f"{folder / RUNNER_NAME}: not there; {OWN_RUNNERS} names a folder with one folder per engine: runner and "
            "libraries. Build it (android_harness/README.md), or unset the variable."
        )
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    return Bundle(engine, folder, files, "", ENGINES[engine].model)


def bundle(engine: str, abi: str) -> Bundle:
    """Return the bundle of an engine for a processor, made now if the cache does not have it.

    Raises:
        UserError: there is none for this engine or processor, or something to make it from is missing.
    """
    if engine not in ENGINES:
        raise UserError(f"engine {engine!r}: no runner for other devices; {', '.join(ENGINES)} have one. Export to it.")
    if abi not in PROCESSORS:
        raise UserError(f"--abi {abi}: no bundle for this processor; {', '.join(PROCESSORS)} expected.")
    how, processor = ENGINES[engine], PROCESSORS[abi]
    version = _version(how)
    compiler = shutil.which(processor.compiler)
    if compiler is None:
        raise UserError(
            f"{processor.compiler}: not found; the runner is compiled with it. Debian, Ubuntu: apt install "
            f"{processor.package} cmake make."
        )
    root = _root() if how.needs_root else None
    folder = cache_folder() / f"bundle-{abi}-{engine}-{version}-{_key(compiler, root)}"
    if not (folder / RECORD).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as name:
            ready = _make(Path(name), engine, abi, version, compiler, root)
            shutil.rmtree(folder, ignore_errors=True)
            ready.rename(folder)
    return _open(folder, engine, processor)


def _open(folder: Path, engine: str, processor: Processor) -> Bundle:
    record = json.loads((folder / RECORD).read_text())
    files = {name: folder / name for name in record["files"]}
    for name, path in files.items():
        if not path.is_file() or sha256(path) != record["files"][name]:
            raise UserError(f"{path}: damaged. Remove {folder}, and it is made anew.")
    return Bundle(engine, folder, files, processor.loader, ENGINES[engine].model)


def _version(how: Engine) -> str:
    try:
        return metadata.version(how.package)
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"{how.package}: not installed here, so it is unknown which version the device shall get: "
            f"{install_hint(how.package)}."
        ) from error


def _root() -> Path:
    """Folder with usr/include/llama.h and the libraries for the device, its C library among them."""
    chosen = os.environ.get(LLAMACPP_ROOT, "")
    if (Path(chosen) / "usr" / "include" / "llama.h").is_file():
        return Path(chosen).resolve()
    raise UserError(
        f"{LLAMACPP_ROOT}={chosen!r}: a folder with usr/include/llama.h and usr/lib/aarch64-linux-gnu/libllama.so "
        "expected. Unpack arm64 packages into it with dpkg-deb -x: libllama-dev of Debian sid and all it depends on."
    )


def _key(compiler: str, root: Path | None) -> str:
    digest = hashlib.sha256(_output([compiler, "--version"]).encode())
    for path in [HARNESS / "CMakeLists.txt", Path(__file__), *sorted((HARNESS / "src").iterdir())]:
        digest.update(path.read_bytes())
    for path in sorted(root.rglob("lib*.so*")) if root else []:
        digest.update(f"{path} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def _make(work: Path, engine: str, abi: str, version: str, compiler: str, root: Path | None) -> Path:
    """Build a bundle below `work` and return its folder."""
    how, processor = ENGINES[engine], PROCESSORS[abi]
    wheel = _wheel(work, how, version, processor)
    libraries = sorted((work / "wheel").glob(how.libraries))
    if not libraries:
        raise UserError(f"{wheel}: no {how.libraries} inside; this version of {how.package} has no C++ runtime.")
    packages = root / "usr" / "lib" / processor.triplet if root else None
    runner = _compile(work, engine, libraries, packages)
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
        "abi": abi,
        "engine": engine,
        "versions": {how.package: version, "compiler": _output([compiler, "--version"]).splitlines()[0]},
        "wheel": {"file": wheel.name, "sha256": sha256(wheel)},
        "files": {path.name: sha256(path) for path in sorted(ready.iterdir())},
    }
    write_atomic(ready / RECORD, json.dumps(record, indent=1) + "\n")
    return ready


def _wheel(work: Path, how: Engine, version: str, processor: Processor) -> Path:
    platforms = [word for name in processor.platforms for word in ("--platform", name)]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    _run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(work),
         "--implementation", "cp", "--python-version", python, *platforms, f"{how.package}=={version}"],
        "Check the network, and that this version exists for that processor.",
    )  # fmt: skip
    wheel = next(work.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "wheel")
    return wheel


def _compile(work: Path, engine: str, libraries: list[Path], packages: Path | None) -> Path:
    settings = [f"-DENGINE={engine}", f"-DCMAKE_TOOLCHAIN_FILE={HARNESS / 'aarch64-linux.cmake'}"]
    if engine == "executorch":
        settings.append(f"-DCMAKE_PREFIX_PATH={libraries[0].parents[1]}")
    else:
        settings += [f"-DONNXRUNTIME_INCLUDE_DIR={_headers()}", f"-DONNXRUNTIME_LIBRARY={libraries[0]}"]
    if packages:
        includes = packages.parents[1] / "include"
        settings += [f"-DLLAMACPP_INCLUDE_DIR={includes}", f"-DLLAMACPP_LIBRARY_DIR={packages}"]
    build = work / "build"
    advice = "A cross compiler, cmake and make are needed."
    _run(["cmake", "-S", str(HARNESS), "-B", str(build), *settings], advice)
    _run(["cmake", "--build", str(build), "--parallel", "2"], advice)
    return build / RUNNER_NAME


def _headers() -> Path:
    """Folder of ONNX Runtime's C API; any version up to the library's will do."""
    chosen = os.environ.get(ONNXRUNTIME_HEADERS)
    for place in [chosen] if chosen else HEADER_PLACES:
        if (Path(place) / HEADER).is_file():
            return Path(place)
    raise UserError(
        f"{HEADER}: not found; the wheel does not bring it. Debian 13, Ubuntu 25.04: apt install libonnxruntime-dev, "
        f"or name the folder that has it: {ONNXRUNTIME_HEADERS}=FOLDER."
    )


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
    return Path(_output([compiler, f"-print-file-name={name}"]))


def _place(source: Path, to: Path) -> None:
    if not source.is_file():
        raise UserError(
            f"{to.name}: needed by the runner, found neither in the engine's wheel nor beside the compiler."
        )
    shutil.copy(source.resolve(), to)


def _needed(path: Path, compiler: str) -> list[str]:
    readelf = re.sub(r"g\+\+[^/]*$", "readelf", compiler)
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _output([readelf, "-d", str(path)]))


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _run(command: list[str], advice: str) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]}: not found. {advice}") from error
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise UserError(f"`{' '.join(command[:4])} ...` ended with {done.returncode}.\n{tail}\n{advice}")
