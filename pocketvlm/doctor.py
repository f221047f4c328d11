"""What this machine has, what a run needs, and what to type about each difference."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pocketvlm.steps import engine
from vlm.errors import UserError, install_hint
from vlm.machine import available_memory, free_disk
from vlm.registry import names

if TYPE_CHECKING:
    from device_bench.sensors.base import Absent
    from pocketvlm.pipeline import RunConfig

State = Literal["ok", "note", "missing"]

ALL_FORMATS = tuple(names("export.formats"))
# Package, module, extra that brings it, and the formats that cannot be written without it.
PACKAGES = (
    ("torch", "torch", "torch", ALL_FORMATS),
    ("transformers", "transformers", "torch", ALL_FORMATS),
    ("safetensors", "safetensors", "torch", ALL_FORMATS),
    ("sentencepiece", "sentencepiece", "torch", ()),
    ("huggingface_hub", "huggingface_hub", "torch", ()),
    ("accelerate", "accelerate", "distill", ()),
    ("deepspeed", "deepspeed", "distill", ()),
    ("peft", "peft", "distill", ()),
    ("tensorboard", "tensorboard", "distill", ()),
    ("bitsandbytes", "bitsandbytes", "quantized", ()),
    ("onnx", "onnx", "export", ("onnx",)),
    ("onnxscript", "onnxscript", "export", ("onnx",)),
    ("onnxruntime", "onnxruntime", "onnx", ("onnx",)),
    ("executorch", "executorch", "executorch", ("executorch",)),
    ("torchao", "torchao", "export", ("executorch",)),
    ("ml_dtypes", "ml_dtypes", "export", ("onnx",)),
    ("coremltools", "coremltools", "coreml", ("coreml",)),
    ("threadpoolctl", "threadpoolctl", "coreml", ("coreml",)),
    ("protobuf", "google.protobuf", "coreml", ("coreml",)),
    ("gguf", "gguf", "llamacpp", ("gguf",)),
    ("llama-cpp-python", "llama_cpp", "llamacpp", ("gguf",)),
    ("pyarrow", "pyarrow", "eval", ()),
    ("pytest", "pytest", "test", ()),
    ("hypothesis", "hypothesis", "test", ()),
)
NOT_IN_ALL = {"quantized"}  # extras that `make install` does not bring
DISTILLING = {"torch", "transformers", "accelerate"}
TOOLS = {
    "gcc": "llama-cpp-python is compiled with it",
    "g++": "llama-cpp-python and the ExecuTorch engine are compiled with it",
    "cmake": "llama-cpp-python and the ExecuTorch engine are compiled with it",
    "ninja": "DeepSpeed compiles with it",
    "ruff": "make lint needs it",
    "mypy": "make lint needs it",
    "make": "the targets of the Makefile need it",
    "git": "the report names the commit",
}
PIP_TOOLS = {"ninja": "distill", "ruff": "test", "mypy": "test"}  # tool -> extra that brings it
# Engine -> what must work for it, tried in a process of its own; "executorch" is compiled on first use.
ENGINES = {
    "onnx": "import vlm.runtimes.onnx",
    "executorch": "from vlm.runtimes._executorch_library import find_sdk; find_sdk()",
    "coreml": "import vlm.runtimes.coreml as c; c.coremltools()",
    "llamacpp": "import vlm.runtimes.llamacpp",
    "torch": "import vlm.runtimes.torch",
}
IMPORT_S = 120


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; "missing" keeps the run from working, "note" does not."""

    topic: str
    name: str
    state: State
    found: str
    advice: str = ""


def examine(
    config: Path | None, devices: Sequence[str] = (), overrides: list[str] | None = None, out: Path | None = None
) -> list[Finding]:
    """Look at this machine, at phones and boards, and with a configuration also at what its run will need.

    Args:
        config: file of a run.
        devices: specifications of phones and boards.
        overrides: key=value changes to the run.
        out: the run's folder, instead of runs/<name>.
    Raises:
        UserError: the configuration is wrong.
    """
    formats: set[str] | None = None
    forecasts: list[Finding] = []
    if config is not None:
        from pocketvlm.pipeline import RunConfig

        settings = RunConfig.load(config, overrides)
        formats = {target.partition(":")[0] for target in settings.export.targets}
        forecasts = _forecast(settings, out or Path("runs") / settings.name)
    return [_python(), *_packages(formats), *_tools(), *_engines(formats), *_bundles(), *_devices(devices), *forecasts]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", "version", "ok", version)


def _packages(formats: set[str] | None) -> list[Finding]:
    return [_package(name, module, extra, needed_by, formats) for name, module, extra, needed_by in PACKAGES]


def _package(name: str, module: str, extra: str, needed_by: tuple[str, ...], formats: set[str] | None) -> Finding:
    if _installed(module):
        return Finding("package", name, "ok", _version(name))
    needed = formats is not None and (name in DISTILLING or bool(formats & set(needed_by)))
    return Finding("package", name, "missing" if needed else "note", "not installed", _installing(extra))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def _installing(extra: str) -> str:
    hint = install_hint(extra)
    return hint if extra in NOT_IN_ALL else f"make install, or: {hint}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "version unknown"


def _tools() -> list[Finding]:
    folder = Path(sys.executable).parent  # pip puts its tools beside python
    search = os.pathsep.join([str(folder), os.environ.get("PATH", "")])
    findings = []
    for tool, purpose in TOOLS.items():
        path = shutil.which(tool, path=search)
        advice = "" if path else f"{purpose}. {_how_to_get(tool)}"
        findings.append(Finding("tool", tool, "ok" if path else "note", path or "not found", advice))
    return findings


def _how_to_get(tool: str) -> str:
    if extra := PIP_TOOLS.get(tool):
        return _installing(extra)
    return f"Debian, Ubuntu: apt-get install {tool}"


def _engines(formats: set[str] | None) -> list[Finding]:
    """Try each engine in a process of its own: one that crashes must not take the doctor with it."""
    return [_engine(name, statement, formats) for name, statement in ENGINES.items()]


def _engine(name: str, statement: str, formats: set[str] | None) -> Finding:
    needed = formats is not None and (name == "torch" or f"vlm.runtimes.{name}" in map(engine, formats))
    bad: State = "missing" if needed else "note"
    try:
        command = [sys.executable, "-c", statement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding("engine", name, bad, f"import takes over {IMPORT_S} s", "Close other programs.")
    if done.returncode == 0:
        return Finding("engine", name, "ok", "works")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Finding("engine", name, bad, last.removeprefix("vlm.errors.UserError: "), _installing(name))


def _devices(others: Sequence[str]) -> list[Finding]:
    from device_bench.devices import open_device

    here = open_device("local").identify()
    memory = f"{here.memory_mb} MiB" if here.memory_mb else "memory unknown"
    found = [Finding("device", "local", "ok", f"{here.name}, {here.cpus} CPUs, {memory}")]
    for spec in others or _phones():
        found += _device(spec)
    if not any(spec.startswith("ssh") for spec in others):
        found.append(Finding("device", "ssh", "note", "not looked for", "pocketvlm doctor --device ssh:USER@HOST"))
    return found


def _phones() -> list[str]:
    """Every phone that adb lists, in whatever state; where it lists none or is not there, the device that says so."""
    from device_bench.devices._adb_link import AdbLink

    try:
        return [f"adb:{serial}" for serial in AdbLink("").states()] or ["adb"]
    except UserError:
        return ["adb"]


def _device(spec: str) -> list[Finding]:
    """What a phone or board is, and what would be measured there and what not."""
    from device_bench.devices import open_device
    from device_bench.devices._remote import RemoteDevice
    from device_bench.devices._survey import survey

    device = open_device(spec)
    try:
        identity = device.identify()
        measured = survey(device) if isinstance(device, RemoteDevice) else {}
    except UserError as error:
        return [Finding("device", spec, "note", "does not answer", str(error))]
    about = ", ".join(str(part) for part in (identity.name, identity.soc, identity.os) if part)
    found = [Finding("device", spec, "ok", f"{about} ({identity.kind})")]
    return found + [_answer("device", f"{spec}: {name}", value) for name, value in measured.items()]


def _bundles() -> list[Finding]:
    """The runners that a phone or board would get: which are built, and what the others need."""
    from device_bench.devices._bundle import examined
    from device_bench.devices._recipe import ENGINES, PROCESSORS

    pairs = [(abi, engine) for abi in PROCESSORS for engine in ENGINES]
    return [_answer("push bundle", f"{abi} {engine}", examined(engine, abi)) for abi, engine in pairs]


def _answer(topic: str, name: str, value: str | Absent) -> Finding:
    if isinstance(value, str):
        return Finding(topic, name, "ok", value)
    return Finding(topic, name, "note", "no", value.reason)


def _forecast(config: RunConfig, run_dir: Path) -> list[Finding]:
    from pocketvlm import forecast

    try:
        last = Finding("forecast", "time", "note", forecast.needed_time(config, run_dir))
    except UserError as error:
        last = Finding("forecast", "input files", "missing", "a file of the configuration is not there", str(error))
    memory = _enough(
        "memory",
        forecast.needed_memory(config),
        available_memory(),
        "Close other programs, or take a smaller student, smaller batches or fewer targets.",
    )
    free = free_disk(run_dir)
    disk = _enough("disk", forecast.needed_disk(config), free, "Free some space, or choose another --out.")
    return [memory, disk, last]


def _enough(name: str, needed: int | None, there: int | None, advice: str) -> Finding:
    if needed is None or there is None:
        unknown = "what the run needs" if needed is None else "what is available"
        return Finding("forecast", name, "note", f"unknown: {unknown} could not be read")
    found = f"about {needed >> 20} MiB needed, {there >> 20} MiB available"
    if needed > there:
        return Finding("forecast", name, "missing", found, advice)
    return Finding("forecast", name, "ok", found)
