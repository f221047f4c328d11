"""python -m benchmarks.real_weights TEXT_MODEL: what each 4-bit export loses of a decoder with real weights.

TEXT_MODEL is a LLaMA in transformers' layout or a .gguf file, for example SmolLM2-135M-Instruct. It becomes the decoder
of a MobileVLM with a random vision tower, which is exported to every 4-bit target. KL per token is that of the float
model's next-token distribution from the export's, over this project's README and CONTRIBUTING, in nats: once in torch
with the weights that the files hold, once in the artifact's own engine, whose activations may be rounded, too. What
GPTQ rounds for is the text of docs/.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.calibration import LayerInputs
from export.config import ExportConfig
from export.run import parse_target, write_artifact
from export.source import open_checkpoint, with_weights
from vlm.data.scenes.train_tokenizer import train_tokenizer
from vlm.folders import finished_folder
from vlm.manifest import Preprocessing
from vlm.models.checkpoint import Checkpoint, save_checkpoint
from vlm.models.mobilevlm import MobileVlmForConditionalGeneration, mobilevlm_config
from vlm.prompts import IMAGE
from vlm.runtimes import open_runtime

ROOT = Path(__file__).parents[1]
TARGETS = ("gguf:q4_0", "gguf:q4_k_m", "onnx:int4", "onnx:int4-sym", "executorch:8da4w", "coreml:int4")
AGAINST = "gguf:q4_0"
TOWER = {"image_size": 96, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
WINDOW = 256  # tokens that are read at once
CONTEXT = 320
TEXT_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One target: KL per token in nats of its weights, how often the likeliest token is the same, and the KL of weights
    and of the engine over the first few tokens, which the engine reads one by one."""

    target: str
    weights: float
    weights_first: float
    engine_first: float
    agreement: float
    megabytes: float
    seconds: float


def load(path: Path) -> tuple[Any, Any]:
    """A text model in float32, and its tokenizer."""
    folder, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if options:  # the weights are floats now; transformers would not save what it calls quantized
        model.hf_quantizer = None
        del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(folder, **options)


def windows(tokenizer: Any, pages: list[Path], count: int) -> list[list[int]]:
    """The first `count` runs of WINDOW tokens of some pages."""
    found = []
    for page in pages:
        ids = tokenizer(page.read_text(), add_special_tokens=False)["input_ids"]
        found += [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    return found[:count]


def make(text: Any, out: Path) -> Path:
    """Write a MobileVLM whose decoder is the text model; its tokenizer is the built-in one, which is not used."""
    with finished_folder(out) as folder:
        tokenizer = train_tokenizer(out.with_name("tokenizer"))
        image = AutoTokenizer.from_pretrained(tokenizer).convert_tokens_to_ids(IMAGE)
        sizes = {key: getattr(text.config, key) for key in TEXT_KEYS}
        sizes |= {"rope_parameters": text.config.rope_parameters}
        model = MobileVlmForConditionalGeneration(mobilevlm_config(TOWER, sizes, image)).eval()
        model.model.language_model.load_state_dict(text.model.state_dict())
        model.lm_head.weight.data.copy_(text.lm_head.weight)
        save_checkpoint(model, tokenizer, Preprocessing(size=TOWER["image_size"]), folder)
    return out


@torch.inference_mode()
def logits(checkpoint: Checkpoint, ids: list[int]) -> Tensor:
    """Log-probabilities of what follows each token, [N, vocabulary]."""
    model = checkpoint.model
    x = model.model.language_model(input_ids=torch.tensor([ids])).last_hidden_state  # [1, N, D]
    return model.lm_head(x)[0].log_softmax(-1)


def divergence(truth: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean KL(truth || found) over tokens, and the share of them whose likeliest successor is the same."""
    kl = (truth.exp() * (truth - found)).sum(-1).mean()
    return float(kl), float((truth.argmax(-1) == found.argmax(-1)).float().mean())


def by_engine(folder: Path, ids: list[int], threads: int) -> Tensor:
    """The same log-probabilities from the artifact's own engine, one token at a time."""
    runtime = open_runtime(folder, threads)
    try:
        runtime.reset()
        rows = [runtime.forward(runtime.embed([token])) for token in ids]
    finally:
        runtime.close()
    return torch.from_numpy(np.stack(rows)).log_softmax(-1)


def measure(checkpoint: Checkpoint, text: str, out: Path, truth: list[Tensor], test: list[list[int]],
            inputs: LayerInputs | None, steps: int) -> Row:  # fmt: skip
    """Export one target and compare it with the float model."""
    target = parse_target(text)
    folder = out / target.name
    folder.mkdir()
    start = time.perf_counter()
    write_artifact(checkpoint, target, folder, ExportConfig(context_length=CONTEXT, calibration_scenes=0), inputs)
    seconds = time.perf_counter() - start
    rounded = with_weights(checkpoint, target.module.dequantized(checkpoint, target.precision, folder))
    found = [logits(rounded, ids) for ids in test]
    weights, agreement = np.mean([divergence(*pair) for pair in zip(truth, found, strict=True)], axis=0)
    first, _ = divergence(truth[0][:steps], found[0][:steps])
    del rounded, found
    engine, _ = divergence(truth[0][:steps], by_engine(folder, test[0][:steps], torch.get_num_threads()))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Row(text, float(weights), first, engine, float(agreement), size / 1e6, seconds)


def main(
    text_model: Annotated[Path, typer.Argument(help="A LLaMA in transformers' layout, or a .gguf file of one.")],
    targets: Annotated[list[str] | None, typer.Option(help="FORMAT:PRECISION; may be given several times.")] = None,
    count: Annotated[int, typer.Option(help=f"Runs of {WINDOW} tokens to compare on.")] = 8,
    calibration: Annotated[int, typer.Option(help="Runs of tokens that GPTQ rounds for; 0: to the nearest.")] = 16,
    steps: Annotated[int, typer.Option(help="Tokens that go through the engines.")] = 96,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    json_out: Annotated[Path | None, typer.Option(help="Write the rows as JSON, too.")] = None,
) -> None:
    """Compare the exports of a decoder with real weights."""
    torch.set_num_threads(threads)
    text, tokenizer = load(text_model)
    test = windows(tokenizer, [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], count)
    known = windows(tokenizer, sorted((ROOT / "docs").glob("*.md")), calibration)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(make(text, Path(scratch, "checkpoint")))
        del text
        table = checkpoint.model.get_input_embeddings().weight

        def sequences() -> Iterator[Tensor]:
            yield from (table[torch.tensor([ids])].detach().float() for ids in known)

        truth = [logits(checkpoint, ids) for ids in test]
        for name in targets or TARGETS:
            inputs = LayerInputs(checkpoint, sequences) if known else None
            rows.append(measure(checkpoint, name, Path(scratch), truth, test, inputs, steps))
            print(asdict(rows[-1]), flush=True)
    show(rows, sum(map(len, test)), steps)
    if json_out:
        json_out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def show(rows: list[Row], tokens: int, steps: int) -> None:
    """Print the table; the verdict compares with llama.cpp's Q4_0."""
    base = next((row for row in rows if row.target == AGAINST), None)
    table = Table("target", f"KL, {tokens} tokens", "same token", f"KL, first {steps}", "in its engine", "MB",
                  "export s", f"no worse than {AGAINST}")  # fmt: skip
    for row in rows:
        verdict = "-" if base is None else "yes" if row.weights <= base.weights else "no"
        table.add_row(
            row.target, f"{row.weights:.4f}", f"{row.agreement:.1%}", f"{row.weights_first:.4f}",
            f"{row.engine_first:.4f}", f"{row.megabytes:.1f}", f"{row.seconds:.0f}", verdict,
        )  # fmt: skip
    Console(width=150).print(table)
    print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    typer.run(main)
