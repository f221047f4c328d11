"""What an export or a scan will need of memory, disk and time, said before it starts; factors estimated at 1.7B."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.config import ExportConfig
from export.formats.base import Cost
from export.precision import COMPONENTS
from export.rounding import component
from vlm.bars import is_float, is_four_bit
from vlm.errors import UserError
from vlm.machine import available_memory, free_disk
from vlm.models.checkpoint import Checkpoint
from vlm.registry import load

GB = 1e9
# Python with torch and an exporter, before any weight.
BASE_MEMORY, BASE_DISK, BASE_SECONDS = 1.2 * GB, 0.02 * GB, 15.0
# Peak bytes per parameter: a float32 model is the reference of parity, and what Core ML's programs are interpreted with
# away from macOS.
PROVING = 5.7
# Seconds on two cores: per parameter and probe; per parameter of a 4-bit target that is rounded for its inputs.
PROVING_SECONDS, GPTQ_SECONDS = 12 / GB, 240 / GB
# Seconds of one prompt's pass in export.sensitivity's scan: of any model, and per parameter.
SCAN_OVERHEAD, SCAN_SECONDS = 0.03, 5 / GB
_HALF = ("coreml", "vulkan")  # ExecuTorch's presets by their delegates


@dataclass(frozen=True)
class Forecast:
    """Bytes and seconds that work needs, beside what is there (None: not known); `what` it is called in messages."""

    memory: float
    disk: float
    seconds: float
    memory_there: int | None
    disk_there: int
    what: str = "export"

    def text(self) -> str:
        """One sentence: what it needs, what you have."""
        there = "an unknown amount of" if self.memory_there is None else f"{self.memory_there / GB:.1f} GB"
        time = f"{self.seconds / 60:.0f} min" if self.seconds >= 60 else f"{self.seconds:.0f} s"
        return (
            f"needs {self.memory / GB:.1f} GB RAM, {self.disk / GB:.2g} GB disk, about {time} "
            f"on two cores; you have {there} RAM, {self.disk_there / GB:.0f} GB disk"
        )

    def refuse_if_hopeless(self, force: bool) -> None:
        """Stop before anything is written that cannot be finished.

        Raises:
            UserError: memory or disk do not suffice, and it is not forced.
        """
        advice = {}
        if self.disk > self.disk_there:
            advice["disk"] = "free some space, choose another --out or fewer targets at once"
        if self.memory_there is not None and self.memory > self.memory_there:
            advice["memory"] = "close other programs"
        key = " (export.force: true)" if self.what == "export" else ""
        if advice and not force:
            raise UserError(
                f"This {self.what} {self.text()}: not enough {' and '.join(advice)}. To get it, "
                f"{'; '.join(advice.values())}. Or try all the same with --force{key}."
            )


def scan_forecast(checkpoint: Checkpoint, passes: int, out: Path) -> Forecast:
    """Forecast a scan of export.sensitivity: float32 weights in memory, `passes` prompts that go through the model."""
    count = parameters(checkpoint)
    seconds = BASE_SECONDS + passes * (SCAN_OVERHEAD + SCAN_SECONDS * count)
    there = available_memory(), free_disk(out)
    return Forecast(BASE_MEMORY + PROVING * count, BASE_DISK, seconds, *there, what="scan")


def forecast(checkpoint: Checkpoint, targets: Sequence[tuple[str, str]], config: ExportConfig, out: Path) -> Forecast:
    """Forecast the export of all targets, one after the other.

    Args:
        checkpoint: the model, its weights in their files.
        targets: (format, precision) each.
        config: how they are rounded and proven.
        out: where the artifacts will lie.
    """
    count = parameters(checkpoint)
    memory = max((cost_of(name).memory for name, _ in targets), default=0.0)
    seconds = sum(seconds_of(name, precision, count, config) for name, precision in targets)
    disk = sum(disk_of(checkpoint, name, precision) for name, precision in targets)
    temporary = max((cost_of(name).temporary * count for name, precision in targets if precision != "f16"), default=0)
    return Forecast(
        BASE_MEMORY + max(memory, PROVING) * count,
        BASE_DISK * len(targets) + disk + temporary,
        seconds,
        available_memory(),
        free_disk(out),
    )


def cost_of(name: str) -> Cost:
    """What a format says of itself."""
    cost: Cost = load("export.formats", name).COST
    return cost


def parameters(checkpoint: Checkpoint) -> int:
    """How many numbers the model has."""
    return sum(parameter.numel() for parameter in checkpoint.model.parameters())


def seconds_of(name: str, precision: str, count: int, config: ExportConfig) -> float:
    """Seconds that writing and proving one target of a format takes on two cores, for a model of `count` numbers."""
    cost = cost_of(name)
    rounding = GPTQ_SECONDS if config.calibration_scenes > 0 and is_four_bit(precision) and cost.gptq else 0.0
    return BASE_SECONDS + (cost.seconds + rounding + PROVING_SECONDS * config.probes) * count


def disk_of(checkpoint: Checkpoint, name: str, precision: str) -> float:
    """Bytes of one artifact."""
    preset, *exceptions = precision.split(",")
    vision = 4.0 if preset == "fp32" else cost_of(name).vision
    kept = dict(exception.split("=") for exception in exceptions)  # component -> storage
    sizes = {part: weight_bytes(kept.get(part, kept.get("decoder", preset))) for part in COMPONENTS}
    for part in ("vision", "projector"):  # an upper bound: some formats write the tower twice
        sizes[part] = max(vision, weight_bytes(kept[part])) if part in kept else vision
    return sum(sizes[component(name)] * parameter.numel() for name, parameter in checkpoint.model.named_parameters())


def weight_bytes(storage: str) -> float:
    """Bytes per weight of what is stored so, with its scales."""
    if is_float(storage) or storage in _HALF:
        return 4.0 if storage == "fp32" else 2.0
    return 0.65 if is_four_bit(storage) else 0.75 if storage.startswith("q5") else 1.1
