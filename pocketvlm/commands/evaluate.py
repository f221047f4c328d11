"""`pocketvlm eval`: accuracy only, of a model or of answers that exist already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from device_bench.tasks.base import Sample

BUILT_IN = "scenes"
COLUMNS = ["benchmark", "score %", "95 % interval", "chance %", "answers"]


def evaluate(
    model: Annotated[
        Path | None, typer.Argument(metavar="[ARTIFACT_OR_CHECKPOINT]", help="Folder of an artifact or checkpoint.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Benchmarks, separated by commas.")] = BUILT_IN,
    data: Annotated[Path | None, typer.Option(help="Folder with the questions of a real benchmark.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Score these answers: ours, or with --data others'.")] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Test images of the built-in benchmark.")] = 150,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 24,
    out: Annotated[Path | None, typer.Option(help="Also write the answers to this .jsonl file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a model on benchmarks, or answers that exist already (--predictions)."""
    from device_bench.evaluate import grade, load_answers, save_answers, score
    from device_bench.predictions import score_predictions
    from pocketvlm.console import print_json, print_table
    from vlm.errors import UserError

    if (model is None) == (predictions is None):
        raise UserError("give either a model (folder of an artifact or checkpoint) or --predictions FILE.")
    if model is not None:
        samples = _ask(model, tasks, data, scenes, threads, max_new_tokens, quiet=as_json)
        accuracy = score(samples)
    elif predictions is not None and data is not None:
        accuracy, samples = score_predictions(predictions, tasks, data)
    elif predictions is not None:
        samples = [grade(sample, sample.answer, sample.ms) for sample in load_answers(predictions)]
        accuracy = score(samples)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_answers(samples, out)
    if as_json:
        print_json({"accuracy": accuracy, "answers": out})
        return
    scores: dict[str, Any] = {**accuracy["tasks"], "average": accuracy["avg"]}
    print_table("", COLUMNS, [_row(name, found) for name, found in scores.items()])


def _row(name: str, found: dict[str, Any]) -> list[str]:
    chance = f"{found['chance']:.1f}" if "chance" in found else ""
    low, high = found["ci95"]
    return [name, f"{found['score']:.1f}", f"{low:.1f} to {high:.1f}", chance, str(found["n"])]


def _ask(
    model: Path, tasks: str, data: Path | None, scenes: int, threads: int, max_new_tokens: int, *, quiet: bool
) -> list[Sample]:
    from device_bench.evaluate import evaluate as ask_all
    from device_bench.evaluate import questions
    from pocketvlm.commands._options import names
    from pocketvlm.console import quietly
    from pocketvlm.progress import Progress
    from vlm.errors import UserError
    from vlm.runtimes import open_runtime

    if data is not None:
        raise UserError(f"--data {data}: belongs to --predictions; benchmarks that are asked bring their own pictures.")
    asked = questions(names(tasks) or [], scenes)
    with Progress(quiet=quiet) as progress, quietly():

        def show(done: int, count: int) -> None:
            progress.update(done / count, f"question {done} of {count}")

        progress.single(f"{len(asked)} questions to {model.name}", 0.02 * len(asked))
        runtime = open_runtime(model, threads)
        try:
            return ask_all(runtime, asked, max_new_tokens, show)
        finally:
            runtime.close()
