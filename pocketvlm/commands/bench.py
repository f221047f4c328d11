"""`pocketvlm bench`: latency, memory, energy and accuracy of artifacts on a device."""

from pathlib import Path
from typing import Annotated, Any

import typer

MEDIANS = ("vision_ms", "ttft_ms", "prefill_tok_s", "decode_tok_s")
COLUMNS = [
    "artifact",
    "device",
    "load ms",
    "vision ms",
    "ttft ms",
    "prefill tok/s",
    "decode tok/s",
    "peak MB",
    "accuracy %",
]


def bench(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT...", help="Folders of artifacts or checkpoints.")
    ],
    out: Annotated[Path, typer.Option(help="Results go to OUT/<device>/<artifact>.json.")],
    device: Annotated[
        list[str] | None,
        typer.Option(help="local, adb[:SERIAL] or ssh:USER@HOST[:PORT]; may be given several times. [default: local]"),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Benchmarks, separated by commas; '' for none.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the questions of real benchmarks.")] = None,
    limit: Annotated[int | None, typer.Option(help="Ask about so many questions of each benchmark.")] = None,
    scenes: Annotated[int | None, typer.Option(help="Test images of the built-in benchmark.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Timed answers.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that one pass may take. [default: 900]")] = None,
    sustained: Annotated[
        float | None, typer.Option(help="Seconds of answering without a pause, on phones and boards. [default: 0]")
    ] = None,
    split: Annotated[bool, typer.Option("--split", help="Several devices share the questions.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure artifacts, each in a fresh process from its folder alone."""
    from device_bench.config import BenchConfig
    from device_bench.run import run_on
    from pocketvlm.commands._options import given, names, ready
    from pocketvlm.commands.evaluate import LONG_ANSWER
    from pocketvlm.progress import Progress

    options = given(tasks=names(tasks), limit=limit, scenes=scenes, iterations=iterations, threads=threads)
    options |= given(timeout_s=timeout, sustained_s=sustained) | (
        {"data": str(data), "max_new_tokens": LONG_ANSWER} if data else {}
    )
    devices = device or ["local"]
    config, *_ = [BenchConfig.parse({"device": spec, **options}, "pocketvlm bench") for spec in devices]
    for artifact in artifacts:
        ready(artifact, as_json)
    with Progress(quiet=as_json) as progress:
        progress.single("measure", 25.0 * len(artifacts))
        results = run_on(devices, config, artifacts, out, progress.update, split)
    show(results, as_json)


def show(results: list[Path], as_json: bool) -> None:
    """Print each result's headline figures."""
    import json

    from pocketvlm.console import print_json, print_table

    trees = [json.loads(path.read_text()) for path in results]
    if as_json:
        print_json({"results": trees})
        return
    print_table("median values", COLUMNS, [_row(tree) for tree in trees])
    missing = {f"{tree['artifact']['name']}: {key}: {why}" for tree in trees for key, why in tree["reasons"].items()}
    if missing:
        print("Not measured:", *sorted(missing), sep="\n  ")


def _row(tree: dict[str, Any]) -> list[str]:
    stats = [tree[key]["p50"] if tree[key] else None for key in MEDIANS]
    accuracy = tree["accuracy"]["avg"]["score"] if tree["accuracy"] else None
    measured, device = [tree["load_ms"], *stats, tree["peak_rss_mb"]], tree["device"]
    if device["kind"] == "emulated":
        measured = [None] * len(measured)  # its answers are right, its speed and memory are no device's
    cells = ["-" if value is None else f"{value:.1f}" for value in (*measured, accuracy)]
    return [tree["artifact"]["name"], f"{device['name']} ({device['kind']})", *cells]
