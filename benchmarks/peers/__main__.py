"""python -m benchmarks.peers TEXT_MODEL: the same LLaMA through the exporters people use today, and through this one.

    --optimum-onnx PYTHON         python of an environment with optimum-onnx (transformers 4.57)
    --optimum-executorch PYTHON   python of one with optimum-executorch
    --genai FOLDER                folder with onnxruntime-genai (pip install --no-deps --target FOLDER)
    --llama-cpp FOLDER            llama.cpp's source, for convert_hf_to_gguf.py

What is not given is not measured. Every tool exports, then reads a prompt of 208 tokens of this project's README and 32
tokens more one by one, each in a process of its own. Parity is KL(float || export) in nats, mean over those 32; memory
is the peak of the process. Ours also writes a small vision tower, and the time to build its checkpoint counts; 4-bit
weights are rounded to the nearest.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.real_weights import ROOT, load

HERE = Path(__file__).parent
PROMPT, MORE = 208, 32
OURS = ("onnx:fp32", "onnx:int4", "executorch:8da4w", "gguf:q4_0")


@dataclass(frozen=True)
class Tool:
    """An exporter: its name in the table, its script, the python that runs it, what that needs in its environment."""

    name: str
    script: str
    python: str
    settings: dict[str, str]
    precision: str = ""


@dataclass(frozen=True)
class Row:
    """One tool's figures; `problem` where it did not get that far."""

    name: str
    export_s: float | None = None
    export_mb: float | None = None
    size_mb: float | None = None
    kl: float | None = None
    prefill: float | None = None
    decode: float | None = None
    run_mb: float | None = None
    problem: str = ""


def call(tool: Tool, arguments: list[str], log: Path) -> tuple[dict[str, float], float]:
    """Run a tool's script; returns the figures in the last line that it printed, and its seconds.

    Raises:
        RuntimeError: it failed; its last line says why.
    """
    command, start = [tool.python, str(HERE / tool.script), *arguments], time.perf_counter()
    with log.open("w") as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | tool.settings, check=False
        )
    seconds, lines = time.perf_counter() - start, log.read_text().strip().splitlines() or ["no message"]
    if done.returncode:
        raise RuntimeError(lines[-1][:200])
    return dict(json.loads(next(line for line in reversed(lines) if line.startswith("{")))), seconds


def measure(tool: Tool, model: Path, work: Path, truth: torch.Tensor, threads: int) -> Row:
    """Export with one tool and read the text with the result."""
    out, log = work / tool.name.replace(" ", "-").replace(":", "-"), work / "log.txt"
    row: dict[str, Any] = {"name": tool.name}
    try:
        arguments = ["export", str(model), str(out), tool.precision]
        exported, row["export_s"] = call(tool, arguments, log)
        row["export_mb"] = exported["peak_mb"]
        row["size_mb"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
        logits = work / "logits.npy"
        arguments = ["run", str(out), str(work / "tokens.npy"), str(logits), str(PROMPT), str(threads)]
        found, _ = call(tool, arguments, log)
    except RuntimeError as error:
        return Row(**row, problem=str(error))
    guess = torch.from_numpy(np.load(logits))[:, : truth.shape[1]].log_softmax(-1)  # some pad the vocabulary
    kl = float((truth.exp() * (truth - guess)).sum(-1).mean())
    return Row(**row, kl=kl, prefill=found["prefill"], decode=found["decode"], run_mb=found["peak_mb"])


def save(model: Any, folder: Path) -> None:
    """Write a text model so that older versions of transformers, too, find the base of its rotary embedding."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rope_theta": config["rope_parameters"]["rope_theta"]}, indent=1))


def tools(
    onnx: Path | None, executorch: Path | None, genai: Path | None, llama_cpp: Path | None, ours: Sequence[str]
) -> list[Tool]:
    """The tools that were given, ours last."""
    here, path = sys.executable, {"PYTHONPATH": str(ROOT)}
    found = []
    if onnx:
        found.append(Tool("optimum-onnx fp32", "optimum_onnx.py", str(onnx), {}))
    if executorch:
        found.append(Tool("optimum-executorch 8da4w", "optimum_executorch.py", str(executorch), {}))
    if genai:
        found.append(Tool("onnxruntime-genai int4", "genai.py", here, {"PYTHONPATH": str(genai)}))
    if llama_cpp:
        settings = {"LLAMA_CPP": str(llama_cpp), "PYTHONPATH": str(llama_cpp / "gguf-py")}
        found.append(Tool("llama.cpp Q4_0", "llamacpp.py", here, settings))
    return [*found, *(Tool(f"pocketvlm {target}", "ours.py", here, path, target) for target in ours)]


def main(
    text_model: Annotated[Path, typer.Argument(help="A LLaMA in transformers' layout, or a .gguf file of one.")],
    optimum_onnx: Annotated[Path | None, typer.Option(help="Python of its environment.")] = None,
    optimum_executorch: Annotated[Path | None, typer.Option(help="Python of its environment.")] = None,
    genai: Annotated[Path | None, typer.Option(help="Folder with onnxruntime-genai.")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="llama.cpp's source.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Ours; may be given several times.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    json_out: Annotated[Path | None, typer.Option(help="Write the rows as JSON, too.")] = None,
) -> None:
    """Compare exporters."""
    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model, tokenizer = load(text_model)
        save(model, work / "model")
        tokenizer.save_pretrained(work / "model")
        text = (ROOT / "README.md").read_text()
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"][: PROMPT + MORE]
        np.save(work / "tokens.npy", np.array(tokens))
        with torch.inference_mode():
            truth = model(torch.tensor([tokens])).logits[0, PROMPT - 1 : -1].log_softmax(-1)  # [32, vocabulary]
        del model
        for tool in tools(optimum_onnx, optimum_executorch, genai, llama_cpp, targets or OURS):
            rows.append(measure(tool, work / "model", work, truth, threads))
            print(asdict(rows[-1]), flush=True)
    show(rows)
    if json_out:
        json_out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table(
        "exporter", "export s", "peak MB", "size MB", "KL", "prefill tok/s", "decode tok/s", "RSS MB", "problem"
    )

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in rows:
        table.add_row(
            row.name, cell(row.export_s, ".0f"), cell(row.export_mb, ".0f"), cell(row.size_mb, ".0f"),
            cell(row.kl, ".4f"), cell(row.prefill, ".0f"), cell(row.decode, ".1f"), cell(row.run_mb, ".0f"),
            row.problem,
        )  # fmt: skip
    Console(width=150).print(table)
    print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    typer.run(main)
