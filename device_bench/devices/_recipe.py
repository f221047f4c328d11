"""What a runner for another processor is built from: the engines, the processors, and what must be on this machine."""

import os
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vlm.errors import UserError, install_hint


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
    toolchain: str | None = None  # file for CMake


ENGINES = {
    "executorch": Engine("executorch", "executorch/lib/libexecutorch*.so", ("model.pte",)),
    "onnx": Engine("onnxruntime", "onnxruntime/capi/libonnxruntime.so.*"),
    "llamacpp": Engine("onnxruntime", "onnxruntime/capi/libonnxruntime.so.*", needs_root=True),
}
RECORD = "bundle.json"
OWN_RUNNERS = "POCKETVLM_RUNNERS"
LLAMACPP_ROOT = "LLAMACPP_ROOT"


def _platforms(processor: str) -> tuple[str, ...]:
    return tuple(f"manylinux{age}_{processor}" for age in ("_2_28", "_2_27", "_2_17", "2014"))


PROCESSORS = {
    "arm64-v8a": Processor(
        "aarch64-linux-gnu-g++",
        "g++-aarch64-linux-gnu",
        "ld-linux-aarch64.so.1",
        "aarch64-linux-gnu",
        _platforms("aarch64"),
        "aarch64-linux.cmake",
    ),
    "x86_64": Processor(
        "x86_64-linux-gnu-g++", "g++", "ld-linux-x86-64.so.2", "x86_64-linux-gnu", _platforms("x86_64")
    ),
}
ONNXRUNTIME_HEADERS = "ONNXRUNTIME_HEADERS"
HEADER = "onnxruntime_c_api.h"
HEADER_PLACES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime")


@dataclass(frozen=True)
class Recipe:
    """How one bundle is made.

    Attributes:
        engine, abi: which one.
        version: of the engine, the one that is installed here.
        compiler: path of the cross compiler.
        root: folder of the device's packages, where the engine needs one.
    """

    engine: str
    abi: str
    version: str
    compiler: str
    root: Path | None

    @property
    def how(self) -> Engine:
        """The engine."""
        return ENGINES[self.engine]

    @property
    def processor(self) -> Processor:
        """The processor."""
        return PROCESSORS[self.abi]

    def headers(self) -> Path | None:
        """Folder of ONNX Runtime's C API, where the engine needs it; any version up to the library's will do.

        Raises:
            UserError: it is nowhere.
        """
        if self.engine == "executorch":
            return None
        chosen = os.environ.get(ONNXRUNTIME_HEADERS)
        for place in [chosen] if chosen else HEADER_PLACES:
            if (Path(place) / HEADER).is_file():
                return Path(place)
        raise UserError(
            f"{HEADER}: not found; the wheel does not bring it. Debian 13, Ubuntu 25.04: apt install "
            f"libonnxruntime-dev, or name the folder that has it: {ONNXRUNTIME_HEADERS}=FOLDER."
        )


def recipe(engine: str, abi: str) -> Recipe:
    """How the bundle of an engine for a processor is made here.

    Raises:
        UserError: there is none for this engine or processor, or something to make it from is missing.
    """
    if engine not in ENGINES:
        raise UserError(f"engine {engine!r}: no runner for other devices; {', '.join(ENGINES)} have one. Export to it.")
    if abi not in PROCESSORS:
        raise UserError(
            f"--abi {abi}: no bundle for this processor; {', '.join(PROCESSORS)} expected. For another, build the "
            f"runner yourself (android_harness/README.md) and name the folder: {OWN_RUNNERS}=FOLDER."
        )
    how, processor = ENGINES[engine], PROCESSORS[abi]
    version, compiler = _version(how), shutil.which(processor.compiler)
    if compiler is None:
        raise UserError(
            f"{processor.compiler}: not found; the runner is compiled with it. Debian, Ubuntu: apt install "
            f"{processor.package} cmake make."
        )
    return Recipe(engine, abi, version, compiler, _root(processor) if how.needs_root else None)


def _version(how: Engine) -> str:
    try:
        return metadata.version(how.package)
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"{how.package}: not installed here, so it is unknown which version the device shall get: "
            f"{install_hint(how.package)}."
        ) from error


def _root(processor: Processor) -> Path:
    """Folder with usr/include/llama.h and the libraries for the device, its C library among them."""
    chosen, library = os.environ.get(LLAMACPP_ROOT, ""), Path("usr", "lib", processor.triplet, "libllama.so")
    if all((Path(chosen) / part).is_file() for part in ("usr/include/llama.h", library)):
        return Path(chosen).resolve()
    raise UserError(
        f"{LLAMACPP_ROOT}={chosen!r}: a folder with usr/include/llama.h and {library} expected. Unpack the device's "
        "packages into it with dpkg-deb -x: libllama-dev of Debian sid and all it depends on."
    )
