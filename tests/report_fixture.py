"""A synthetic run folder for the report's tests: made-up numbers of believable size, never the result of any model."""

import hashlib
import json
import math
import random
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

from device_bench.evaluate import grade, save_answers, score
from device_bench.measure import latency_stats
from device_bench.tasks.base import BenchQuestion, Sample
from device_bench.tasks.scenes import questions
from tests.manifests import write_manifest
from vlm.folders import sha256, tree_sha256
from vlm.manifest import Parity, Rung, list_files

# name -> (engine, bytes, share of answers that change, milliseconds per decoded token)
ARTIFACTS = {
    "onnx-fp32": ("onnx", 7_900_000, 0.0, 1.1),
    "onnx-int4": ("onnx", 2_100_000, 0.04, 0.8),
    "executorch-fp32": ("executorch", 8_300_000, 0.0, 1.6),
    "executorch-8da4w": ("executorch", 2_600_000, 0.025, 1.2),
    "coreml-fp16": ("coreml", 4_100_000, 0.004, None),
    "coreml-int4": ("coreml", 1_900_000, 0.02, None),
    "gguf-f16": ("llamacpp", 5_200_000, 0.003, 2.3),
    "gguf-q4_0": ("llamacpp", 3_000_000, 0.05, 1.9),
}
NEEDS_MACOS = (
    "needs macOS: on this system the Core ML program is interpreted, which says nothing about its speed or memory"
)
NOTE = "synthetic values, for the report's tests"


def make_run(folder: Path, scenes: int = 24, artifacts: tuple[str, ...] = tuple(ARTIFACTS)) -> Path:
    """Write a run folder as the pipeline leaves it: config, models, artifacts, results, stage stamps."""
    asked = questions(scenes)
    run = folder / "runs" / "synthetic"
    teacher = folder / "teacher"
    write_model(teacher, answer(asked, 0.86, "teacher"), parameters=4_900_000)
    student = answer(asked, 0.66, "student")
    write_model(run / "student", student, parameters=1_210_000)
    write_model(run / "undistilled", forget(student, 0.12, "undistilled"), parameters=1_210_000)
    for name in ("student", "undistilled"):
        write_json(run / name / "history.json", history(name))
    config = {"name": "synthetic", "distill": {"teacher": str(teacher), "seed": 0}, "export": {"probes": 16}}
    (run / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    source = tree_sha256(run / "student")
    for name in artifacts:
        write_artifact(run / "artifacts" / name, source)
        write_result(run, name, forget(student, ARTIFACTS[name][2], name))
    for index, (name, seconds) in enumerate(
        {"student": 291.4, "undistilled": 291.4, "export-onnx-fp32": 9.2, "bench-onnx-fp32": 21.7}.items()
    ):
        stamp = {
            "inputs": {"code": name[:2]} if index > 1 else {},
            "build": name,
            "seconds": seconds,
            "finished": f"2000-01-01T00:0{index}:00+0000",
        }
        write_json(run / "stages" / f"{name}.json", stamp)
    return run


def answer(asked: list[BenchQuestion], share: float, seed: str) -> list[Sample]:
    """Answers of which about `share` are right; the others repeat the truth of another question of the same kind."""
    rng = random.Random(seed)
    wrong: dict[tuple[str, str], list[str]] = {}
    for question in asked:
        wrong.setdefault((question.family, question.kind), []).append(str(question.truth))
    return [
        grade(
            question,
            str(question.truth) if rng.random() < share else rng.choice(wrong[question.family, question.kind]),
            ms=4.0,
        )
        for question in asked
    ]


def forget(samples: list[Sample], share: float, seed: str) -> list[Sample]:
    """The same answers, of which about `share` became another one."""
    rng = random.Random(seed)
    others = [sample.answer for sample in samples]
    return [grade(sample, rng.choice(others)) if rng.random() < share else sample for sample in samples]


def write_model(folder: Path, samples: list[Sample], parameters: int) -> None:
    """A checkpoint folder: a safetensors header without weights, eval.json and the answers."""
    folder.mkdir(parents=True)
    shapes = {"model.vision_tower.a": [parameters // 2], "model.language_model.b": [parameters - parameters // 2]}
    header = json.dumps(
        {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    save_answers(samples, folder / "answers.jsonl")
    write_json(folder / "eval.json", {"accuracy": score(samples), "answers": "answers.jsonl"})


def history(name: str) -> dict[str, Any]:
    """Two stages of decaying terms; gradient norms every tenth row, as the trainer probes them."""
    terms = ["sup", "attention", "vision", "logits"] if name == "student" else ["sup"]
    rng = random.Random(name)
    rows = []
    for index in range(320):
        fall = math.exp(-index / 90)
        noise = rng.uniform(0.85, 1.15)
        values = {
            "sup": 0.4 + 4.1 * fall,
            "attention": 0.07 + 0.85 * fall,
            "vision": 0.02 + 9 * fall**3,
            "logits": 0.3 + 4 * fall,
        }
        row_terms = {
            term: {
                "value": values[term] * noise,
                "grad_norm": values[term] * rng.uniform(0.5, 2) if index % 10 == 0 else None,
                "weight": 4.0 + rng.random() if term == "attention" else 1.0,
            }
            for term in terms
        }
        stage = "pretrain" if index < 110 else "finetune"
        rows.append(
            {
                "step": index * 5,
                "stage": stage,
                "loss": sum(t["value"] for t in row_terms.values()),
                "lr": 1e-3,
                "terms": row_terms,
            }
        )
    reports = (
        ["The term logits had less than 1 % of the cross-entropy's gradient at 3 of 32 probes."]
        if name == "student"
        else []
    )
    return {"seed": 0, "seconds": 142.0, "steps": 1600, "terms": terms, "rows": rows, "reports": reports}


def write_artifact(folder: Path, source: str) -> None:
    """An artifact folder whose one file is sparse, with a manifest that climbed its ladder."""
    engine, size, _, _ = ARTIFACTS[folder.name]
    format_, precision = folder.name.split("-")
    folder.mkdir(parents=True)
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(size)
    files = [file.model_copy(update={"sha256": hashlib.sha256(b"").hexdigest()}) for file in list_files(folder)]
    write_manifest(
        folder,
        format=format_,
        engine=engine,
        files=files,
        source_sha256=source,
        versions={"synthetic-engine": "0.0", "numpy": "0.0"},
        notes=[NOTE],
        parity=ladder(precision),
    )


def ladder(precision: str) -> Parity:
    """A ladder that passes; a quantized artifact has a second reference."""
    wide = precision in ("fp32", "fp16", "f16")
    bar = {"fp32": 0.9999, "fp16": 0.999, "f16": 0.999}.get(precision, 0.998)
    judge = "float" if wide else "dequantized"
    rungs = [Rung(name="pixels", metric="max_abs", value=2.4e-7, bar=1e-5, passed=True, reference="float")]
    for source in [judge] if wide else [judge, "float"]:
        judged, loss = source == judge, 2e-6 if source == judge else 0.02
        for name in ("vision", "projector", "logits"):
            limit = bar if judged else None
            rungs.append(Rung(name=name, metric="cosine", value=1 - loss, bar=limit, passed=True, reference=source))
        rungs.append(Rung(name="logits", metric="kl", value=loss**2, bar=None, passed=True, reference=source))
        share, limit = (1.0 if judged else 0.875), 0.99 if wide else None
        rungs.append(Rung(name="tokens", metric="agreement", value=share, bar=limit, passed=True, reference=source))
    summary = {
        "vision_cos": 0.999998,
        "logits_cos": 0.999998,
        "kl": 4e-12,
        "token_agreement": 1.0,
        "first_divergence": None,
    }
    return Parity(rungs=rungs, probes=16, passed=True, **summary)


def write_result(run: Path, name: str, samples: list[Sample]) -> Path:
    """A result file with its raw samples and answers, as device_bench.run leaves them."""
    folder = run / "results" / "local"
    folder.mkdir(parents=True, exist_ok=True)
    pace = ARTIFACTS[name][3]
    raw = raw_latency(pace, name) if pace else {"load_ms": []}
    write_json(folder / f"{name}.samples.json", raw)
    save_answers(samples, folder / f"{name}.answers.jsonl")
    stats = {key: value.model_dump() for key, value in latency_stats(raw).items()} if pace else {}
    measured = {**dict.fromkeys(("vision_ms", "ttft_ms", "prefill_tok_s", "decode_tok_s")), **stats}
    measured |= {"load_ms": raw["load_ms"][1] if pace else None, "peak_rss_mb": 150 + 40 * pace if pace else None}
    reasons = {key: NEEDS_MACOS for key, value in measured.items() if value is None}
    manifest = run / "artifacts" / name / "manifest.json"
    format_, precision = name.split("-")
    about = {
        "name": name,
        "format": format_,
        "precision": precision,
        "bytes": ARTIFACTS[name][1],
        "manifest_sha256": sha256(manifest),
    }
    host = {
        "kind": "host",
        "name": "synthetic machine",
        "soc": "no processor",
        "os": "none",
        "cpus": 2,
        "memory_mb": 4096,
    }
    result = {
        "schema": 1, "artifact": about, "device": host, "valid": True, "invalid_because": None,
        "settings": {"iterations": 20, "warmup": 5, "threads": 2, "cold_loads": 3, "scenes": 24},
        **measured, "energy_j": None, "thermal": None,
        "reasons": {**reasons, "energy_j": "no power sensor", "thermal": "no thermal zone"},
        "imported": {"torch": False, "transformers": False}, "notes": [],
        "samples": f"{name}.samples.json", "answers": f"{name}.answers.jsonl",
        "accuracy": score(samples), "created": "2000-01-01T00:00:00+00:00", "seconds": 20.0,
    }  # fmt: skip
    write_json(folder / f"{name}.json", result)
    return folder / f"{name}.json"


def raw_latency(pace: float, seed: str) -> dict[str, list[float]]:
    """Raw samples of a latency pass, in milliseconds, with a tail."""
    rng = random.Random(seed)

    def drawn(scale: float, n: int) -> list[float]:
        return [scale * (1 + rng.expovariate(9)) for _ in range(n)]

    return {
        "load_ms": drawn(90 * pace, 3),
        "preprocess_ms": drawn(0.8, 20),
        "vision_ms": drawn(14 * pace, 20),
        "prefill_ms": drawn(9 * pace, 20),
        "prefill_tokens": [190.0] * 20,
        "ttft_ms": drawn(25 * pace, 20),
        "decode_ms": drawn(pace, 640),
    }


def write_json(path: Path, tree: Any) -> None:
    """Write a tree as JSON, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, default=asdict))
