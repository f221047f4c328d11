"""This project: the text model as the decoder of a MobileVLM with a small random tower."""

import sys
from pathlib import Path

import child
import numpy as np


def export(model: Path, out: Path, precision: str) -> None:
    """Write the artifact "<format>:<precision>", rounded to the nearest."""
    from benchmarks.real_weights import load, make
    from export.config import ExportConfig
    from export.run import parse_target, write_artifact
    from export.source import open_checkpoint

    target = parse_target(precision)
    checkpoint = make(load(model)[0], out.with_name(f"{out.name}-checkpoint"))
    out.mkdir(parents=True)
    config = ExportConfig(context_length=child.CONTEXT, calibration_scenes=0)
    write_artifact(open_checkpoint(checkpoint), target, out, config)


def start(out: Path, threads: int) -> child.Step:
    """Open it."""
    from vlm.runtimes import open_runtime

    runtime = open_runtime(out, threads)
    runtime.reset()

    def step(ids: list[int]) -> np.ndarray:
        return runtime.forward(runtime.embed(ids))

    return step


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))
    child.main(export, start)
