"""python -m benchmarks.export_real_size: all four 4-bit exports of a random-weight MobileVLM V2 1.7B, in one process.

Prints per target: seconds, peak memory so far (of this process, and of the largest one it started), and the size of
what holds the embedding and the decoder beside bits x parameters plus scales. The weights are random: this measures
time, memory and size, never accuracy; they are rounded to the nearest unless `--calibration-scenes` asks for GPTQ.
"""

import json
import os
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.random_checkpoint import make
from export.config import ExportConfig
from export.precision import COMPONENTS
from export.rounding import component
from export.run import parse_target, write_artifact
from export.source import open_checkpoint
from vlm.models.checkpoint import Checkpoint

TARGETS = ("onnx:int4", "executorch:8da4w", "coreml:int4", "gguf:q4_0")
BAR_SECONDS, BAR_BYTES, BAR_SIZE = 360.0, 7e9, 0.03
# Bits of a weight with its share of what a block of 32, or a row, has besides: ONNX float32 scales and zero points of
# the weights' bits, ExecuTorch bfloat16 scales, Core ML and llama.cpp float16 scales; q6_k has 8-bit scales in a block
# of 256.
BITS = {
    "onnx": {
        "int4": 5.125,
        "int4-sym": 5.0,
        "int4-128": 4.28125,
        "int4-sym-128": 4.25,
        "int8": 9.25,
        "int8-dynamic": 8.0,
    },
    "executorch": {"8da4w": 4.5, "8da4w-128": 4.125, "8da8w": 8.0, "int8": 8.0, "fp32": 32.0},
    "coreml": {"int4": 4.5, "fp16": 16.0},
    "gguf": {"q4_0": 4.5, "q6_k": 6.5625, "q8_0": 8.5, "f16": 16.0},
}


@dataclass(frozen=True)
class Row:
    """One target: wall and CPU seconds, peak resident bytes, bytes of its files and what they should be."""

    target: str
    seconds: float
    cpu_seconds: float
    peak: float
    peak_of_children: float
    files: dict[str, int]
    expected: float
    size: int
    precisions: dict[str, str | None]

    def line(self) -> str:
        """The figures in one line."""
        return (
            f"{self.target:18} {self.seconds:6.1f} s ({self.cpu_seconds:6.1f} s CPU), peak {self.peak / 1e9:.2f} GB "
            f"(children {self.peak_of_children / 1e9:.2f}), {self.size / 1e6:7.1f} MB where bits and scales make "
            f"{self.expected / 1e6:7.1f} ({self.size / self.expected - 1:+.2%})"
        )


def counts(checkpoint: Checkpoint) -> dict[str, int]:
    """Parameters of each component; of the vision tower, those that are read."""
    found = dict.fromkeys(COMPONENTS, 0)
    layer = checkpoint.model.config.vision_feature_layer
    unread = ".layers.23." if layer == -2 else ".none."  # CLIP-L has 24 layers, and hidden_states[-2] is read
    for name, parameter in checkpoint.model.named_parameters():
        part = component(name)
        if part != "vision" or (unread not in name and "post_layernorm" not in name):
            found[part] += parameter.numel()
    return found


def expected_bytes(checkpoint: Checkpoint, name: str, precisions: dict[str, str | None]) -> float:
    """Bits x parameters plus scales, of all components."""
    storages = precisions | {"head": precisions["head"] or precisions["decoder"]}
    return sum(BITS[name][str(storages[part])] / 8 * count for part, count in counts(checkpoint).items())


def measure(checkpoint: Checkpoint, text: str, out: Path, config: ExportConfig) -> Row:
    """Write one target as `pocketvlm export` does, without the proof."""
    target = parse_target(text)
    folder = out / target.name
    folder.mkdir(parents=True)
    start, busy = time.perf_counter(), time.process_time()
    manifest = write_artifact(checkpoint, target, folder, config)
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    own, theirs = (
        resource.getrusage(who).ru_maxrss * 1024.0 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    files = {file.path: file.bytes for file in manifest.files}
    precisions = manifest.precisions.model_dump()
    weights = {path: size for path, size in files.items() if path != "tokenizer.json"}
    size = sum(size for path, size in weights.items() if path != "mmproj.gguf")  # the same tower a second time
    expected = expected_bytes(checkpoint, target.format, precisions)
    return Row(text, seconds, cpu, own, theirs, files, expected, size, precisions)


def main(
    checkpoint: Annotated[Path | None, typer.Option(help="Its folder; if absent a random one is made.")] = None,
    size: Annotated[str, typer.Option(help="Of the random one: 1.7b, 3b or 7b.")] = "1.7b",
    targets: Annotated[list[str] | None, typer.Option(help="FORMAT:PRECISION; may be given several times.")] = None,
    context_length: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = 512,
    calibration_scenes: Annotated[int, typer.Option(help="Pictures that GPTQ rounds for; 0: to the nearest.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Keep the artifacts here, for benchmarks.decode_real_size.")] = None,
    json_out: Annotated[Path | None, typer.Option(help="Write the rows as JSON, too.")] = None,
) -> None:
    """Export at real size and measure."""
    torch.set_num_threads(threads)
    config = ExportConfig(context_length=context_length, calibration_scenes=calibration_scenes)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=checkpoint.parent if checkpoint else None) as scratch:
        folder = checkpoint or make(Path(scratch, "checkpoint"), size)
        print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
        opened = open_checkpoint(folder)
        print(f"hash of the checkpoint {opened.sha256[:12]}", flush=True)  # once, and not counted to any target
        for text in targets or TARGETS:
            rows.append(measure(opened, text, out or Path(scratch), config))
            print(rows[-1].line(), flush=True)
        print(f"load after: {os.getloadavg()[0]:.1f}")
    print(verdict(rows))
    if json_out:
        json_out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def verdict(rows: list[Row]) -> str:
    """The figures that have a bar, beside it."""
    seconds, peak = sum(row.seconds for row in rows), max(max(row.peak, row.peak_of_children) for row in rows)
    worst = max(abs(row.size / row.expected - 1) for row in rows)
    return (
        f"together {seconds:.0f} s (bar {BAR_SECONDS:.0f}), peak {peak / 1e9:.2f} GB (bar {BAR_BYTES / 1e9:.0f}), "
        f"sizes within {worst:.1%} (bar {BAR_SIZE:.0%})"
    )


if __name__ == "__main__":
    typer.run(main)
