"""What a training step costs with the teacher's outputs read from an exact cache, against the plain student's step.

    python -m benchmarks.cached_step [--hidden 512] [--layers 24] [--answer 150]

Random models on the CPU in float32, all three terms of the loss as published; the vocabulary has the share of the
student that it has in MobileVLM V2 1.7B. The same batches go through the plain student and the student with the cached
teacher, in turn; the medians of their processor times are compared, and the losses with those of the live teacher. On
a busy machine put `chrt -r 1` before the command: other programs then wait.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from distill.build import build
from distill.config import DistillConfig
from distill.data.quarantine import Quarantine
from distill.data.rows import Rows
from distill.model import AlignKD
from distill.teacher.offline import offline
from distill.training.processes import Processes
from vlm.data.scenes.train_tokenizer import train_tokenizer
from vlm.manifest import Preprocessing
from vlm.models.checkpoint import save_checkpoint
from vlm.models.mobilevlm import MobileVlmForConditionalGeneration, mobilevlm_config

VISION = {
    "image_size": 96,
    "patch_size": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
RECORDS, ROUNDS = 2, 9
STEP_BAR, LOSS_BAR = 1.05, 1e-3


def main() -> int:
    """Measure, print JSON, and exit with 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of the student; the teacher has twice that")
    parser.add_argument("--layers", type=int, default=24, help="of the student; the teacher has as many")
    parser.add_argument("--answer", type=int, default=150, help="words of an answer")
    parser.add_argument("--vocabulary", type=int, default=8100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments)
    print(json.dumps(found, indent=1))
    return int(found["cached_over_plain"] > STEP_BAR or found["worst_loss_difference"] > LOSS_BAR)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each kind, and how far the cached losses are from the live ones."""
    config = _config(folder, arguments)
    live, _, encoder = build(config.model_copy(update={"cache": None}))
    cached, tokenizer_folder, _ = build(config)
    plain, _, _ = build(config.without_distillation())
    stage = config.stages[0]
    rows = Rows(stage, encoder, Quarantine(folder, stage.name), live.tower.preprocessing)
    offline(config, cached, tokenizer_folder, [(stage, rows)], encoder.max_length, Processes())
    batches = [rows.batch([rows[index]]) for index in range(RECORDS)]
    cached.load_state_dict(live.state_dict())
    with torch.no_grad():
        expected = [float(live(**batch)["loss"]) for batch in batches]
    del live
    kinds = {"plain": plain, "cached": cached}
    optimizers = {name: torch.optim.AdamW(module.parameters(), lr=0.0, fused=True) for name, module in kinds.items()}
    losses = [_step(cached, optimizers["cached"], batch) for batch in batches]
    _step(plain, optimizers["plain"], batches[0])  # warm, as the other is
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(ROUNDS):
        for name, module in kinds.items():
            start = time.process_time()
            _step(module, optimizers[name], batches[number % RECORDS])
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens": int(batches[0]["input_ids"].shape[1]),
        "student_parameters": sum(p.numel() for p in plain.parameters()),
        "rounds": ROUNDS,
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "least_seconds": {name: round(min(values), 4) for name, values in seconds.items()},
        "cached_over_plain": round(medians["cached"] / medians["plain"], 4),
        "worst_loss_difference": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
    }


def _step(module: AlignKD, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> float:
    loss = module(**batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _config(folder: Path, arguments: argparse.Namespace) -> DistillConfig:
    """Two random checkpoints that share a tower, and records of one image and one long answer."""
    tokenizer_folder = train_tokenizer(folder / "tokenizer")
    from transformers import AutoTokenizer

    image_token_id = AutoTokenizer.from_pretrained(tokenizer_folder).convert_tokens_to_ids("<image>")
    tower: dict[str, torch.Tensor] = {}
    for name, factor in (("teacher", 2), ("student", 1)):
        width = arguments.hidden * factor
        text = {
            "hidden_size": width,
            "intermediate_size": width * 11 // 4,
            "num_hidden_layers": arguments.layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64,
            "max_position_embeddings": 2048,
            "vocab_size": arguments.vocabulary,
        }
        torch.manual_seed(factor)
        model = MobileVlmForConditionalGeneration(mobilevlm_config(VISION, text, image_token_id))
        tower = tower or model.model.vision_tower.state_dict()
        model.model.vision_tower.load_state_dict(tower)
        (folder / name).mkdir()
        save_checkpoint(model, tokenizer_folder, Preprocessing(size=VISION["image_size"]), folder / name)
    data = _records(folder, arguments.answer)
    tree = {
        "teacher": str(folder / "teacher"),
        "student": str(folder / "student"),
        "stages": [{"name": "train", "data": data, "steps": 1, "batch_size": 1, "learning_rate": 1e-4}],
        "attention": {},
        "vision_tokens": {},
        "logits": {},
        "cache": {"kind": "exact", "folder": str(folder / "cache")},
        "precision": "fp32",
    }
    return DistillConfig.parse(tree, "benchmark")


def _records(folder: Path, words: int) -> dict[str, str]:
    """Records of one image and one long answer, as a stage's data."""
    Image.effect_noise((96, 96), 60).convert("RGB").save(folder / "noise.png")
    conversation = [
        {"from": "human", "value": "<image>\nwhat is in the picture"},
        {"from": "gpt", "value": " ".join(["red"] * words)},
    ]
    record = {"image": "noise.png", "conversations": conversation}
    (folder / "records.json").write_text(json.dumps([{"id": str(n), **record} for n in range(RECORDS)]))
    return {
        "kind": "llava",
        "records": str(folder / "records.json"),
        "images": str(folder),
        "cache": str(folder / "indices"),
    }


if __name__ == "__main__":
    sys.exit(main())
