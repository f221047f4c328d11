"""Decode, prefill and image-encode speed of artifacts of one model, in one run, beside the machine's memory bandwidth.

    python -m benchmarks.decode_real_size ARTIFACT... [--against gguf-q4_0] [--checkpoint FOLDER] [--out FILE.json]

Each artifact is opened alone in a process of its own, all of them in turn and that `--rounds` times, so that what else
the machine does meets all alike. The prompt is a picture's 144 vision tokens between two runs of 32 words (208 tokens);
then one token at a time. Decoding reads every weight of the decoder once per token: the share of the bound is the bytes
that are read in a second over what the same cores read from memory when they do nothing else. Where the GGUF artifact
has an mmproj, stock llama.cpp encodes the picture too. Speeds mean something only on a machine that does nothing else;
its load is printed with them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Column, Table

from vlm.manifest import read_manifest

ROOT = Path(__file__).parents[1]
WORDS = 32  # of text before the picture, and again behind it
NEW_TOKENS = 32
VISION_REPEATS = 3
BANDWIDTH_FLOATS = 1 << 26  # per thread and operand: 256 MiB, far beyond any cache
BANDWIDTH_REPEATS = 5
# What a token does not read: the vision tower, the embedding table (one row of it), and what is no weight.
PTE_BITS = {"fp32": 32, "8da8w": 8, "8da4w": 4 + 16 / 32, "8da4w-128": 4 + 16 / 128}  # per weight, scales included
NOT_DECODED = ("vision_encoder", "embed_tokens", "mmproj", "tokenizer", "manifest")


def bandwidth(threads: int) -> float:
    """Bytes that `threads` threads together read from memory in a second, at best."""
    arrays = [np.ones(BANDWIDTH_FLOATS, np.float32) for _ in range(2 * threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(BANDWIDTH_REPEATS):
            start = time.perf_counter()
            list(pool.map(np.dot, arrays[:threads], arrays[threads:]))
            best = min(best, time.perf_counter() - start)
    return sum(array.nbytes for array in arrays) / best


def decoder_bytes(folder: Path, checkpoint: Path | None) -> float | None:
    """Bytes of weights that one decoded token reads; None where nothing tells them apart from the others."""
    manifest = read_manifest(folder)
    if manifest.format != "executorch":
        return sum(file.bytes for file in manifest.files if not file.path.startswith(NOT_DECODED))
    # One file holds everything: count the decoder's weights in the checkpoint instead.
    return None if checkpoint is None else decoder_weights(checkpoint) * PTE_BITS[manifest.precisions.decoder] / 8


def decoder_weights(checkpoint: Path) -> int:
    """Weights of the decoder's and the head's matrices."""
    from export.graph import Decoder
    from export.source import open_checkpoint

    parameters = Decoder(open_checkpoint(checkpoint).model, 1).parameters()
    return sum(parameter.numel() for parameter in parameters if parameter.ndim == 2)


def measure(folder: Path, threads: int, out: Path) -> dict[str, Any]:
    """Open one artifact and time it; its vision tokens go to `out` (.npy)."""
    from vlm.runtimes import open_runtime

    start = time.perf_counter()
    runtime = open_runtime(folder, threads)
    result: dict[str, Any] = {"load_s": time.perf_counter() - start}
    pixels = runtime.pixels(picture(runtime.facts.preprocessing.size))
    seconds = []
    for _ in range(VISION_REPEATS):
        start = time.perf_counter()
        vision = runtime.encode_image(pixels)
        seconds.append(time.perf_counter() - start)
    np.save(out, vision.tokens)
    rng = np.random.default_rng(0)
    words = [runtime.embed(rng.integers(3, 500, WORDS).tolist()) for _ in range(2)]
    prompt = np.concatenate([words[0], vision.tokens, words[1]])  # [208, D]
    runtime.reset()
    runtime.forward(prompt[:8])  # the first call of an engine makes its buffers
    runtime.reset()
    start = time.perf_counter()
    logits = runtime.forward(prompt)
    result |= {"prefill": len(prompt) / (time.perf_counter() - start), "encode_s": min(seconds)}
    steps = []
    for _ in range(NEW_TOKENS):
        start = time.perf_counter()
        logits = runtime.forward(runtime.embed([int(logits.argmax())]))
        steps.append(time.perf_counter() - start)
    runtime.close()
    return result | {"decode": 1 / statistics.median(steps), "rss_mb": peak_rss_mb()}


def measure_mmproj(folder: Path, out: Path) -> dict[str, Any]:
    """Encode the picture with stock llama.cpp."""
    from export._gguf_mmproj_probe import vision_tokens

    manifest = read_manifest(folder)
    image = np.asarray(picture(manifest.preprocessing.size))
    tokens, seconds = vision_tokens(folder / "decoder.gguf", folder / "mmproj.gguf", image)
    np.save(out, tokens.reshape(-1, manifest.hidden_size))
    return {"encode_s": seconds, "rss_mb": peak_rss_mb()}


def picture(size: int) -> Image.Image:
    """Colours that change over every patch, of the very size the tower takes, so that nothing is resized."""
    y, x = np.mgrid[:size, :size]
    waves = [np.sin(x / (7 + 3 * channel)) * np.cos(y / (11 + 2 * channel)) for channel in range(3)]
    return Image.fromarray((127.5 + 127 * np.stack(waves, -1)).astype(np.uint8))


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1e3


def reference_tokens(checkpoint: Path, out: Path) -> None:
    """The vision tokens of the checkpoint in torch, float32."""
    import torch

    from export.graph import VisionEncoder
    from export.source import in_float32, open_checkpoint
    from vlm.preprocess import pixel_values

    source = open_checkpoint(checkpoint)
    preprocessing = source.facts.preprocessing
    pixels = torch.from_numpy(pixel_values(picture(preprocessing.size), preprocessing))
    with torch.no_grad():
        np.save(out, in_float32(VisionEncoder(source.model))(pixels)[0][0].numpy())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Lowest cosine of the rows of a and b [V, D]."""
    return float(np.min((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)))


def child(arguments: list[str]) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.decode_real_size", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = done.stdout.splitlines()
    return dict(json.loads(lines[-1])) if lines else {}


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure everything in turn."""
    threads = ["--threads", str(options.threads)]
    tokens = {folder.name: work / f"{folder.name}.npy" for folder in options.artifacts}
    rounds: dict[str, list[dict[str, Any]]] = {folder.name: [] for folder in options.artifacts}
    mmproj = next((folder for folder in options.artifacts if (folder / "mmproj.gguf").is_file()), None)
    stock: list[dict[str, Any]] = []
    speeds, loads = [], []
    for _ in range(options.rounds):
        speeds.append(bandwidth(options.threads))
        loads.append(os.getloadavg()[0])
        for folder in options.artifacts:
            rounds[folder.name].append(child(["--one", str(folder), "--tokens", str(tokens[folder.name]), *threads]))
        if mmproj:
            stock.append(child(["--mmproj", str(mmproj), "--tokens", str(work / "mmproj.npy")]))
    best: dict[str, dict[str, Any]] = {
        name: {key: _best(key, found) for key in found[0]} for name, found in rounds.items()
    }
    for folder in options.artifacts:
        read = decoder_bytes(folder, options.checkpoint)
        best[folder.name]["bytes"] = read_manifest(folder).bytes
        best[folder.name]["bound"] = None if read is None else read * best[folder.name]["decode"] / max(speeds)
    if stock:
        best["stock llama.cpp mmproj"] = {key: _best(key, stock) for key in stock[0]}
        tokens["stock llama.cpp mmproj"] = work / "mmproj.npy"
    if options.checkpoint:
        child(["--reference", str(options.checkpoint), "--tokens", str(work / "torch.npy")])
        for name, file in tokens.items():
            best[name]["cosine"] = cosine(np.load(file), np.load(work / "torch.npy"))
    return {"bandwidth": max(speeds), "loads": loads, "threads": options.threads, "artifacts": best, "rounds": rounds}


def _best(key: str, found: list[dict[str, Any]]) -> float:
    """The undisturbed one of several measurements: rates at their highest, times and memory at their lowest."""
    return (max if key in ("prefill", "decode") else min)(float(one[key]) for one in found)


def show(result: dict[str, Any], against: str) -> None:
    """Print the table; ratios are to the artifact `against`."""
    rows = result["artifacts"]
    base = rows.get(against)
    table = Table(Column("artifact", overflow="fold"), "size", "prefill tok/s", "ratio", "decode tok/s",
                  "slowest round", "ratio", "of the bound", "image s", "vision cosine", "RSS MB")  # fmt: skip

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for name, row in rows.items():
        ratios = {key: row[key] / base[key] if base and key in row else None for key in ("prefill", "decode")}
        size = f"{row['bytes'] / 1e6:.0f} MB" if "bytes" in row else "-"
        slowest = min((one["decode"] for one in result["rounds"].get(name, [])), default=None)
        table.add_row(
            name, size, cell(row.get("prefill"), ".0f"), cell(ratios["prefill"], ".2f"),
            cell(row.get("decode"), ".1f"), cell(slowest, ".1f"), cell(ratios["decode"], ".2f"),
            cell(row.get("bound"), ".0%"), cell(row["encode_s"], ".2f"), cell(row.get("cosine"), ".6f"),
            cell(row["rss_mb"], ".0f"),
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    loads = ", ".join(f"{load:.1f}" for load in result["loads"])
    console.print(
        f"{2 * WORDS} words and a picture, {NEW_TOKENS} new tokens, {result['threads']} threads, best of "
        f"{len(result['loads'])} rounds; memory {result['bandwidth'] / 1e9:.1f} GB/s; load of the machine {loads}."
    )


def main() -> None:
    """Read the arguments; the parent compares, its children measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="*", type=Path, help="folders of `pocketvlm export`, of one model")
    parser.add_argument("--against", default="gguf-q4_0", help="the artifact that ratios are to")
    parser.add_argument("--checkpoint", type=Path, help="the model in torch, for the vision tokens' cosine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "decode_real_size.json")
    for name in ("one", "mmproj", "reference", "tokens"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.threads, options.tokens)))
    elif options.mmproj:
        print(json.dumps(measure_mmproj(options.mmproj, options.tokens)))
    elif options.reference:
        reference_tokens(options.reference, options.tokens)
    else:
        options.artifacts = [folder.resolve() for folder in options.artifacts]
        work = options.out.with_suffix("")
        work.mkdir(parents=True, exist_ok=True)
        result = compare(options, work)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        show(result, options.against)


if __name__ == "__main__":
    main()
