"""`make study-tiny`: what distillation is worth on the built-in default, over seeds, paired by seed and question."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from device_bench.evaluate import load_answers
from device_bench.stats import paired_seeds
from pocketvlm.console import exit_codes
from pocketvlm.ledger import Ledger
from pocketvlm.pipeline import RunConfig, advance, locked
from pocketvlm.progress import Progress
from pocketvlm.steps import distill, evaluate
from vlm.folders import write_atomic

VARIANTS = ("undistilled", "student")


def study(config: RunConfig, seeds: list[int], out: Path) -> Path:
    """Train and evaluate the distilled and the undistilled student for each seed; what still holds is kept.

    Args:
        config: the run whose distillation is studied.
        seeds: seeds of weights and data order; both variants of a seed share them.
        out: folder of the study; study.json in it has the paired differences, study.md says them.
    """
    for seed in seeds:
        run_dir = out / f"seed-{seed}"
        seeded = config.distill.model_copy(update={"seed": seed, "undistilled": True})
        run = config.model_copy(update={"name": f"{config.name}-seed-{seed}", "distill": seeded})
        steps = [distill(seeded, run_dir), *(evaluate(run, run_dir, variant) for variant in VARIANTS)]
        with locked(run_dir), Progress() as progress:
            ledger = Ledger(run_dir)
            pending = ledger.pending(steps)
            progress.start({s.title: ledger.expected_s(s) for s in steps if any(p.name in pending for p in s.products)})
            for step in steps:
                progress.end(advance(ledger, step, {}, progress))
    return summarise(seeds, out)


def summarise(seeds: list[int], out: Path) -> Path:
    """Write study.json and study.md from the finished seeds."""
    pairs, rows = [], []
    for seed in seeds:
        folders = [out / f"seed-{seed}" / "evaluations" / variant for variant in VARIANTS]
        before, after = (load_answers(folder / "answers.jsonl") for folder in folders)
        pairs.append((before, after))
        scores = [json.loads((folder / "eval.json").read_text())["accuracy"] for folder in folders]
        rows.append({"seed": seed, **dict(zip(VARIANTS, scores, strict=True))})
    difference = paired_seeds(pairs)
    write_atomic(out / "study.json", json.dumps({"seeds": rows, "difference": difference}, indent=1) + "\n")
    write_atomic(out / "study.md", _markdown(rows, difference))
    return out / "study.md"


def _markdown(rows: list[dict], difference: dict) -> str:
    lines = ["| seed | undistilled | distilled | difference |", "|---|---|---|---|"]
    for row, points in zip(rows, difference["avg"]["seeds"], strict=True):
        plain, distilled = (row[variant]["avg"]["score"] for variant in VARIANTS)
        lines.append(f"| {row['seed']} | {plain:.1f} | {distilled:.1f} | {points:+.1f} |")
    lines += [
        "",
        "| family | difference | 95 % interval (seeds and images) | 95 % t interval (seeds) |",
        "|---|---|---|---|",
    ]
    for name, entry in difference.items():
        interval = "{:+.1f} to {:+.1f}".format(*entry["ci95"])
        t = "{:+.1f} to {:+.1f}".format(*entry["t_ci95"]) if entry["t_ci95"] else "needs two seeds"
        lines.append(f"| {name} | {entry['points']:+.1f} | {interval} | {t} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line of the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/study-tiny"))
    arguments = parser.parse_args()
    with exit_codes():
        print(study(RunConfig.load(arguments.config), arguments.seeds, arguments.out).read_text())


if __name__ == "__main__":
    main()
