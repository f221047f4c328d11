"""An engine that always wants to end its answer, and otherwise misbehaves as its artifact's manifest says."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np

from vlm.errors import UserError
from vlm.manifest import Manifest, read_manifest
from vlm.runtimes.base import Runtime, VisionOutput

# Holds a lock for a minute, if it lives so long.
CHILD = "import fcntl, signal; f = open({!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); signal.alarm(60); signal.pause()"


class FakeRuntime(Runtime):
    """Answers nothing, at once."""

    engine = "fake"

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.facts = folder, manifest.facts(folder)
        self.emulated, self.ballast = "emulated" in manifest.settings, "ballast" in manifest.settings

    def encode_image(self, pixels: np.ndarray) -> VisionOutput:
        """Zeros."""
        return VisionOutput(None, np.zeros((4, 8), np.float32))

    def embed(self, ids: list[int]) -> np.ndarray:
        """Zeros."""
        return np.zeros((len(ids), 8), np.float32)

    def reset(self) -> None:
        """Nothing is kept."""

    def forward(self, embeds: np.ndarray) -> np.ndarray:
        """The end token, or another one where there is none."""
        if self.ballast:
            np.ones(100 * 2**20, np.uint8).sum()
        return np.eye(9, dtype=np.float32)[self.facts.eos_id if self.facts.eos_id >= 0 else 3]  # [vocabulary]


def open(folder: Path, threads: int) -> FakeRuntime:
    """Note who we are, then do what the manifest's settings say."""
    manifest = read_manifest(folder)
    does = {name: str(value) for name, value in manifest.settings.items()}
    about = {"pid": os.getpid(), "cwd": str(Path.cwd()), "environment": dict(os.environ)}
    with (Path(does["notes"]) / "processes").open("a") as file:
        file.write(json.dumps(about) + "\n")
    if "print" in does:
        print(does["print"])
    if "signal" in does:
        os.kill(os.getpid(), getattr(signal, does["signal"]))
    if "torch" in does:
        sys.modules["torch"] = types.ModuleType("torch")
    if "user_error" in does:
        raise UserError(does["user_error"])
    if "hang" in does:
        subprocess.Popen([sys.executable, "-S", "-c", CHILD.format(does["hang"])])
        signal.pause()
    return FakeRuntime(folder, manifest)
