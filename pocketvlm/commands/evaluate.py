"""`pocketvlm eval`: accuracy only, of a model or of answers that exist already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from device_bench.evaluate import Accuracy
    from device_bench.session import Session
    from device_bench.tasks.base import Sample

BUILT_IN = "scenes"
AGAINST_COLUMNS = ["benchmark", "points", "95 % interval", "p corrected", "test", "answers", "lost", "won"]
COLUMNS = ["benchmark", "score %", "95 % interval", "chance %", "answers"]
# Longest answers: the built-in benchmark's are short; LLaVA's and MobileVLM's loader gives real ones 128.
SHORT_ANSWER, LONG_ANSWER = 24, 128
# What an answer file has too little or too much of, counted in the details.
LEFT = {
    "unanswered": "questions, which count as wrong and are not in the image subset",
    "left_out": "answers to none of these questions",
    "repeated": "answers, of which the last counts",
}
RECORDS = Path("runs") / "eval"


def evaluate(
    model: Annotated[
        Path | None, typer.Argument(metavar="ARTIFACT_OR_CHECKPOINT", help="Folder of an artifact or checkpoint.")
    ] = None,
    tasks: Annotated[str, typer.Option("--tasks", "--task", help="Benchmarks, separated by commas.")] = BUILT_IN,
    data: Annotated[Path | None, typer.Option(help="Folder with the questions of real benchmarks.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Score these answers: ours, LLaVA's, VLMEvalKit's.")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with these answers of ours, paired.")] = None,
    only: Annotated[str | None, typer.Option(help="Ask only questions of this kind or category.")] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Test images of the built-in benchmark.")] = 150,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask about so many questions of each benchmark.")] = None,
    seed: Annotated[int, typer.Option(help="Which questions --limit draws.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 2,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the images, one GPU each.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Questions that a checkpoint answers at once.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens: 24 on scenes, else 128.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the graded answers to this .parquet or .jsonl file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a model on benchmarks, or answers that exist already (--predictions).

    A model's answers are kept while they come: the same command goes on where it was interrupted.
    """
    from device_bench.records import write_records
    from pocketvlm.commands._options import names, ready
    from vlm.errors import UserError

    if (model is None) == (predictions is None):
        raise UserError("give either a model (folder of an artifact or checkpoint) or --predictions FILE.")
    if predictions is not None:
        accuracy, samples = _read(predictions, tasks, data)
        if out:
            write_records(samples, out, {"predictions": str(predictions), "tasks": tasks})
    elif model is not None:
        chosen = names(tasks)
        if not chosen:
            raise UserError("--tasks: no benchmark is named. Give one or several, or leave it out for scenes.")
        ready(model, as_json)
        longest = max_new_tokens or (SHORT_ANSWER if chosen == [BUILT_IN] else LONG_ANSWER)
        out = out or RECORDS / f"{model.resolve().name}-{'-'.join(chosen)}.parquet"
        settings = {"tasks": chosen, "scenes": scenes, "only": only, "limit": limit, "seed": seed}
        settings |= {"max_new_tokens": longest, "batch": batch}
        accuracy, samples = _ask(_session(model, data, settings, threads, processes, out), out, quiet=as_json)
    _show(accuracy, _compare(against, samples) if against else {}, out, as_json)


def _compare(against: Path, samples: list[Sample]) -> dict[str, Any]:
    """Paired differences to other answers, p values corrected together, with the answers lost and won."""
    from device_bench.judge_accuracy import flips
    from device_bench.records import read_records
    from device_bench.stats import holm, pair, paired_difference

    before, after = pair(read_records(against), samples)
    found = paired_difference(before, after)
    corrected = holm({name: item["p"] for name, item in found.items() if name != "avg"})
    changed = flips(against.name, before, after)
    return {
        name: {
            **item,
            "p_corrected": corrected.get(name, item["p"]),
            "lost": sum(flip.points < 0 for flip in changed if name in ("avg", flip.family)),
            "won": sum(flip.points > 0 for flip in changed if name in ("avg", flip.family)),
        }
        for name, item in found.items()
    }


def _read(predictions: Path, tasks: str, data: Path | None) -> tuple[Accuracy, list[Sample]]:
    from device_bench.evaluate import publish, regrade, score, versions
    from device_bench.predictions import score_predictions
    from device_bench.records import is_ours, read_header, read_records
    from pocketvlm.commands._options import names
    from vlm.errors import UserError

    if is_ours(predictions) and data is None:
        chosen = None if tasks == BUILT_IN else names(tasks)
        records = (sample for sample in read_records(predictions) if chosen is None or sample.family in chosen)
        samples = [regrade(sample) for sample in records]
        if not samples:
            raise UserError(f"{predictions}: holds no answers to --tasks {tasks}. Leave --tasks out to score all.")
        editions = read_header(predictions).get("data") or versions(samples)
        asked = {sample.family for sample in samples}
        return publish(score(samples), {name: found for name, found in editions.items() if name in asked}), samples
    return score_predictions(predictions, tasks, data)


def _session(
    model: Path, data: Path | None, settings: dict[str, Any], threads: int, processes: int, out: Path
) -> Session:
    from device_bench.evaluate import questions, versions
    from device_bench.session import Session, weights_digest
    from device_bench.subset import subset
    from pocketvlm.team import team
    from vlm.errors import UserError

    asked = questions(settings["tasks"], settings["scenes"], data)
    header = {"model": weights_digest(model), "data": versions(asked), **settings}
    if settings["only"]:
        asked = [question for question in asked if settings["only"] in (question.kind, question.category)]
    if settings["limit"]:
        asked = subset(asked, settings["limit"], settings["seed"])
    if not asked:
        raise UserError(f"--only {settings['only']}: no question is of this kind or category.")
    journal = out.with_name(out.name + ".answers")
    longest, batch = settings["max_new_tokens"], settings["batch"]
    return Session(model, asked, header, journal, longest, threads, processes, batch, team())


def _ask(session: Session, out: Path, *, quiet: bool) -> tuple[Accuracy, list[Sample]]:
    from device_bench.evaluate import publish, score
    from device_bench.records import write_records
    from pocketvlm.console import quietly
    from pocketvlm.progress import Progress

    with Progress(quiet=quiet or session.team.rank > 0) as progress, quietly():

        def show(done: int, count: int) -> None:
            progress.update(done / count, f"question {done} of {count}")

        progress.single(f"{len(session.questions)} questions to {session.model.name}", 0.02 * len(session.questions))
        samples = session.run(show)
    if not samples:
        raise typer.Exit  # another process of `accelerate launch` writes for all
    write_records(samples, out, session.header)
    session.clear()
    return publish(score(samples), session.header["data"]), samples


def _show(accuracy: Accuracy, differences: dict[str, Any], out: Path | None, as_json: bool) -> None:
    from pocketvlm.console import print_json, print_table

    if as_json:
        print_json({"accuracy": accuracy, "answers": out, **({"against": differences} if differences else {})})
        return
    scores: dict[str, Any] = {**accuracy["tasks"], "average": accuracy["avg"]}
    print_table("", COLUMNS, [_row(name, found) for name, found in scores.items()])
    for name, found in accuracy["tasks"].items():
        for line in _notes(name, found):
            print(line)
    if differences:
        print_table("difference", AGAINST_COLUMNS, [_difference(name, item) for name, item in differences.items()])
    if out:
        print(f"Answers: {out}")


def _notes(name: str, found: Any) -> list[str]:
    """The score as people publish it, which data it is of, and what was not asked."""
    details, lines = found["details"], []
    if "line" in details:
        edition = details["data"]["edition"]
        names = dict.fromkeys(edition.values() if isinstance(edition, dict) else [edition])
        parts = ", ".join(f"{part} {count:,}" for part, count in details["data"].get("labels", {}).items())
        asked = f"{details['data']['questions']:,} questions" + (f": {parts}" if parts else "")
        lines = [details["line"], f"  data: {'; '.join(names)} ({asked})"]
        lines += [f"  by other rules: {details['vlmevalkit']}"] if "vlmevalkit" in details else []
        if found["n"] < details["data"]["questions"]:
            lines.append(f"  scored: {found['n']:,} answers of them")
        counted = {key: details["data"].get(key, 0) for key in LEFT}
        lines += [f"  {key.replace('_', ' ')}: {count:,} {LEFT[key]}" for key, count in counted.items() if count]
    if "unasked" in details:
        lines.append(f"{name}: {details['unasked']} questions did not fit into the context; they count as unanswered.")
    return lines


def _difference(name: str, item: dict[str, Any]) -> list[str]:
    low, high = item["ci95"]
    values = [f"{item['points']:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{item['p_corrected']:.3g}", item["test"]]
    return ["average" if name == "avg" else name, *values, *(str(item[key]) for key in ("n", "lost", "won"))]


def _row(name: str, found: dict[str, Any]) -> list[str]:
    chance = f"{found['chance']:.1f}" if "chance" in found else ""
    low, high = found["ci95"]
    return [name, f"{found['score']:.1f}", f"{low:.1f} to {high:.1f}", chance, str(found["n"])]
