"""`pocketvlm gate`: is a report no worse than a baseline?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from device_bench.gate import Verdict
    from device_bench.judge import Allowances

POWER_COLUMNS = ["what", "benchmark", "answers", "standard error", "smallest drop seen", "answers needed"]


def gate(
    new: Annotated[Path | None, typer.Argument(metavar="NEW", help="report.json to judge.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="report.json to compare with.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Points that the average accuracy may lose.")] = None,
    max_slowdown: Annotated[float | None, typer.Option(help="Percent that medians may get slower.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Do not judge: accuracy, parity, latency, memory or size.")
    ] = None,
    allowances: Annotated[Path | None, typer.Option(help="YAML file with all allowances.")] = None,
    power: Annotated[
        float | None, typer.Option(min=0.1, help="Only say how many answers it takes to see a drop of so many points.")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Show the difference, then make NEW the baseline.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Also write the verdict here, for a pull request.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the flipped answers here.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML here, for CI.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Judge a report against a baseline; a run keeps the verdict for the reports that are drawn of it.

    Exit 0 when nothing got worse, 1 on a regression, 2 when it cannot be judged.
    """
    from device_bench import gate as judge
    from device_bench import gate_output
    from device_bench.judge import Allowances
    from pocketvlm.commands._options import given
    from vlm.errors import UserError
    from vlm.folders import write_atomic

    base = Allowances.load(allowances) if allowances else Allowances()
    changes = given(max_drop=max_drop, max_slowdown=max_slowdown, ignore=ignore)
    allowed = Allowances.parse({**base.model_dump(), **changes}, "pocketvlm gate")
    if power is not None:
        _power(power, new, baseline, allowed, as_json)
        return
    if new is None or baseline is None:
        raise UserError("give the report to judge and --baseline FILE, or --power POINTS.")
    if update and not baseline.exists():
        _update(new, baseline)
        return
    verdict = judge.gate(new, baseline, allowed)
    for file, draw in ((markdown, gate_output.markdown), (html, gate_output.page), (junit, gate_output.junit)):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, draw(verdict))
    _show(verdict, as_json)
    if update:
        _update(new, baseline)
        return
    judge.save(verdict, new)
    raise typer.Exit(verdict.exit_code)


def _show(verdict: Verdict, as_json: bool) -> None:
    from device_bench.gate_output import table
    from pocketvlm.console import out, print_json

    if as_json:
        print_json(verdict.record())
        return
    out().print(table(verdict))
    for each in verdict.compared:
        lost = sum(flip.points < 0 for flip in each.flips)
        if each.flips:
            print(f"{each.where}: {lost} answers lost, {len(each.flips) - lost} won")
    print(f"Gate: {verdict.state}", *verdict.reasons, *verdict.notes, sep="\n  ")


def _update(new: Path, baseline: Path) -> None:
    import sys

    from device_bench.baseline import write_baseline
    from device_bench.gate import read_report

    busy = write_baseline(*read_report(new), baseline)
    if busy:
        print(
            f"The machine was busy while {', '.join(busy)} were timed: the gate will not judge their latency against "
            "this baseline. Measure them again on an idle machine.",
            file=sys.stderr,
        )
    print(f"Baseline: {baseline} now holds {new}; review and commit it.", file=sys.stderr)


def _power(drop: float, new: Path | None, baseline: Path | None, allowed: Allowances, as_json: bool) -> None:
    """From two reports what their comparison sees; without them what independent answers would."""
    from device_bench.gate import gate as compare
    from device_bench.power import DISAGREEMENTS, questions_needed
    from pocketvlm.console import print_json, print_table
    from vlm.errors import UserError

    if (new is None) != (baseline is None):
        raise UserError("--power takes two reports (NEW and --baseline) or none.")
    chances = allowed.alpha, allowed.power
    if new is None or baseline is None:
        rows = {share: questions_needed(drop, share, *chances) for share in DISAGREEMENTS}
        if as_json:
            print_json({"drop": drop, "alpha": chances[0], "power": chances[1], "needed": rows})
            return
        print(f"To see a drop of {drop:g} points in {chances[1]:.0%} of cases with {chances[0]:.0%} false alarms:")
        table = [[f"{share:.0%}", f"{count:,}"] for share, count in rows.items()]
        print_table("", ["answers on which the two disagree", "answers needed"], table)
        if drop <= allowed.max_drop:
            print(f"The gate itself lets the average lose {allowed.max_drop:g} points: see --max-drop.")
        return
    found = [row for each in compare(new, baseline, allowed).compared for row in _seen(each, drop, chances)]
    if as_json:
        print_json({"drop": drop, "alpha": chances[0], "power": chances[1], "comparisons": found})
    else:
        print_table("", POWER_COLUMNS, [[str(value) for value in row.values()] for row in found])


def _seen(compared: Any, drop: float, chances: tuple[float, float]) -> list[dict[str, Any]]:
    from device_bench.power import needed_from, smallest_drop

    return [
        {
            "what": compared.where,
            "benchmark": "average" if name == "avg" else name,
            "answers": item["n"],
            "error": round(item["error"], 2),
            "sees": round(smallest_drop(item["error"], *chances), 2),
            "needed": needed_from(item["error"], item["n"], drop, *chances),
        }
        for name, item in compared.found.items()
    ]
