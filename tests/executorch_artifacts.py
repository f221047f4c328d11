"""What the ExecuTorch tests share: random checkpoints of awkward sizes and their artifacts, written once a run."""

import json
from pathlib import Path

import pytest

from tests.artifacts import write_artifact
from tests.tiny import save_random_checkpoint
from vlm.errors import UserError
from vlm.models.checkpoint import load_checkpoint
from vlm.runtimes._executorch_library import build

# Lowering takes a second of CPU time per linear, and quantized ones take twice as long.
LAYERS = {"fp32": 2, "8da4w": 1}


def compiled_engine() -> Path:
    """The folder with the compiled engine; skips with the reason where it cannot be compiled."""
    try:
        return build()
    except UserError as error:
        pytest.skip(str(error))


def checkpoint_folder(factory: pytest.TempPathFactory, precision: str) -> Path:
    """A model with query heads that share key heads, rows that groups of 32 do not divide, and one vision layer."""
    folder = factory.getbasetemp() / "executorch" / f"checkpoint-{precision}"
    if not folder.exists():
        layers = LAYERS[precision]
        save_random_checkpoint(folder, num_key_value_heads=2, intermediate_size=168, num_hidden_layers=layers)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vision_feature_layer": 1}))
    return folder


def artifact_folder(factory: pytest.TempPathFactory, precision: str) -> Path:
    """The artifact of `checkpoint_folder` in `precision`, without parity; skips where nothing could open it."""
    compiled_engine()
    checkpoint = checkpoint_folder(factory, precision)
    folder = checkpoint.with_name(precision)
    if not folder.exists():
        folder.mkdir()
        write_artifact(load_checkpoint(checkpoint), f"executorch:{precision}", folder)
    return folder
