"""The result file of one artifact on one device, filled pass by pass; what was not measured is null with a reason."""

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from device_bench.config import BenchConfig
from device_bench.measure import latency_stats, summarise
from device_bench.metrics import MEASURED, NAMES
from device_bench.telemetry import Identity
from device_bench.worker import FORBIDDEN
from vlm.errors import CheckFailed, UserError
from vlm.folders import sha256, write_atomic
from vlm.manifest import MANIFEST, read_manifest

# Of the processors' time. Threads of an engine wait for each other: one that loses its processor for a time slice of
# some milliseconds costs a small model's whole answer, so that a tenth of a processor already moves the median.
BUSY = 0.05
EMULATED = "needs macOS: here the Core ML program is interpreted, which says nothing about its speed or memory"


class Recorder:
    """Collects the passes of one artifact and writes its result, raw samples and log side by side.

    Args:
        artifact: an artifact folder or a checkpoint.
        config: how it is measured.
        identity: the device.
        folder: where the result goes; results of an earlier measurement of this artifact are removed at once.
    Raises:
        UserError: the artifact is damaged or none.
    """

    def __init__(self, artifact: Path, config: BenchConfig, identity: Identity, folder: Path) -> None:
        self.artifact, self.config, self.identity = artifact, config, identity
        self.name = artifact.resolve().name
        self._about = describe(artifact)
        folder.mkdir(parents=True, exist_ok=True)
        self.result, self.log = folder / f"{self.name}.json", folder / f"{self.name}.log"
        self.samples, self.answers = folder / f"{self.name}.samples.json", folder / f"{self.name}.answers.jsonl"
        for path in (self.result, self.log, self.samples, self.answers):
            path.unlink(missing_ok=True)
        self._start = time.monotonic()
        self._values: dict[str, Any] = dict.fromkeys(MEASURED)
        self._reasons = {"energy_j": "this machine has no power sensor that the bench reads"}
        self._raw: dict[str, Any] = {"load_ms": []}
        self._imported: dict[str, bool | None] = dict.fromkeys(FORBIDDEN)  # None until a process has told
        self._state: dict[str, Any] | None = None  # of the machine, around the latency pass
        self._notes: list[str] = []
        self._engine: str | None = None
        self._emulated = False
        self._invalid: str | None = None

    def wants(self, kind: str) -> bool:
        """Whether a pass tells something about this artifact: an emulated engine only loads once and answers."""
        if kind == "accuracy":
            return bool(self.config.tasks)
        if kind == "sustained" and not self.config.sustained_s:
            return False
        return not self._emulated

    def record(self, kind: str, found: dict[str, Any]) -> None:
        """Take over what a pass found.

        Raises:
            CheckFailed: a training library was imported by the process of an artifact that shall do without.
        """
        self._engine, self._emulated = found["engine"], found["emulated"]
        for library, seen in found["imported"].items():
            self._imported[library] = self._imported[library] or seen
        getattr(self, f"_record_{kind}")(found)
        self._notes += found.get("notes", [])
        if broken := found.get("broken_rules"):
            self.invalidate(f"{self.name}: {'; '.join(broken)}")
        foreign = [library for library in FORBIDDEN if self._imported[library]]
        if foreign and self._engine != "torch":
            names = " and ".join(foreign)
            raise CheckFailed(f"{self.name}: the {kind} pass imported {names}; an artifact must run without.")

    @property
    def begun(self) -> bool:
        """Whether a pass has been recorded."""
        return self._engine is not None

    def invalidate(self, why: str) -> None:
        """Mark the measurement as one that must not be used."""
        self._invalid = why

    def write(self) -> Path:
        """Write raw samples and result, each whole or not at all.

        Raises:
            CheckFailed: the result is invalid.
        """
        write_atomic(self.samples, json.dumps(self._raw) + "\n")
        write_atomic(self.result, json.dumps(self._tree(), indent=1) + "\n")
        if self._invalid:
            raise CheckFailed(self._invalid)
        return self.result

    def _record_load(self, found: dict[str, Any]) -> None:
        if self._emulated:
            self._reasons |= dict.fromkeys((*NAMES, "thermal", "state"), EMULATED)
            return
        self._raw["load_ms"].append(found["load_ms"])
        self._values["load_ms"] = summarise(self._raw["load_ms"]).p50

    def _record_latency(self, found: dict[str, Any]) -> None:
        self._raw |= found["samples"]
        stats = latency_stats(found["samples"])
        self._values |= {name: value.model_dump() for name, value in stats.items()}
        before, after, share = found["before"], found["after"], found["others_share"]
        busy = None
        if share is not None and share > BUSY:
            busy = (
                f"the machine was busy: during the latency pass other processes used {share:.1%} of its processors "
                f"(more than {BUSY:.0%}), so the latencies are upper bounds"
            )
        self._state = {"before": before, "after": after, "others_share": share, "busy": busy, **found.get("method", {})}
        self._notes += [busy] if busy else []
        if "energy" in found:
            self._values["energy_j"] = found["energy"]
            self._reasons["energy_j"] = found["energy_reason"]
        temperatures = [before["temperature_c"], after["temperature_c"]]
        if all(temperatures):
            self._values["thermal"] = {"before_c": temperatures[0], "after_c": temperatures[1]}
        else:
            unreadable = after["reasons"].get("temperature_c")
            self._reasons["thermal"] = unreadable or "no thermal zone was readable before the latency pass"
        if share is None:
            self._notes.append(f"how busy other processes kept the machine is unknown: {found['others_reason']}")

    def _record_sustained(self, found: dict[str, Any]) -> None:
        self._raw["sustained"] = found["raw"]
        self._values["thermal"] = {**(self._values["thermal"] or {}), "sustained": found["sustained"]}

    def _record_memory(self, found: dict[str, Any]) -> None:
        self._raw["rss_mb"] = {"loaded": found["loaded_rss_mb"], "peak": found["peak_rss_mb"]}
        self._values["peak_rss_mb"] = found["peak_rss_mb"]
        self._values["pss_mb"], self._reasons["pss_mb"] = found["pss_mb"], found["pss_reason"]
        if found["peak_rss_mb"] is None:
            self._reasons["peak_rss_mb"] = "no VmHWM in /proc/self/status on this system"

    def _record_accuracy(self, found: dict[str, Any]) -> None:
        self._values["accuracy"] = found["accuracy"]

    def _tree(self) -> dict[str, Any]:
        missing = self._invalid or ("no task was asked for" if not self.config.tasks else "not measured")
        found = {**self._values, "state": self._state}
        reasons = {name: self._reasons.get(name, missing) for name, value in found.items() if value is None}
        return {
            "schema": 1,
            "artifact": self._about,
            "device": self.identity.model_dump(),
            "valid": self._invalid is None,
            "invalid_because": self._invalid,
            "settings": self.config.model_dump(),
            "engine": self._engine,
            **found,
            "reasons": reasons,
            "imported": self._imported,
            "notes": self._notes,
            "samples": self.samples.name,
            "answers": self.answers.name if self.answers.is_file() else None,
            "log": self.log.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._start, 3),
        }


def describe(artifact: Path) -> dict[str, Any]:
    """Name, format, precision, size and manifest hash of an artifact; of a checkpoint its size, as format torch.

    Raises:
        UserError: neither an artifact nor a checkpoint, or a damaged artifact.
    """
    name = artifact.resolve().name
    if (artifact / MANIFEST).is_file():
        manifest = read_manifest(artifact)
        return {
            "name": name,
            "format": manifest.format,
            "precision": manifest.precision,
            "bytes": manifest.bytes,
            "manifest_sha256": sha256(artifact / MANIFEST),
        }
    if (artifact / "config.json").is_file():
        size = sum(os.path.getsize(path) for path in artifact.rglob("*") if path.is_file())
        return {"name": name, "format": "torch", "precision": "fp32", "bytes": size, "manifest_sha256": None}
    raise UserError(
        f"{artifact}: no artifact (manifest.json) and no checkpoint (config.json). Export one: pocketvlm export."
    )
