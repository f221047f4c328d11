"""`pocketvlm gate`: is a report no worse than a baseline?"""

from pathlib import Path
from typing import Annotated

import typer


def gate(
    new: Annotated[Path, typer.Argument(metavar="NEW", help="report.json to judge.")],
    baseline: Annotated[Path, typer.Option(help="report.json to compare with.")],
    max_drop: Annotated[float | None, typer.Option(help="Points that the average accuracy may lose.")] = None,
    max_slowdown: Annotated[float | None, typer.Option(help="Percent that medians may get slower.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Do not judge: accuracy, parity, latency, memory or size.")
    ] = None,
    allowances: Annotated[Path | None, typer.Option(help="YAML file with all allowances.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the verdict here, for a pull request.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Judge a report against a baseline and keep the verdict in it.

    Exit 0 when nothing got worse, 1 on a regression, 2 when it cannot be judged.
    """
    from device_bench import gate as judge
    from device_bench.judge import Allowances
    from pocketvlm.commands._options import given
    from pocketvlm.console import out, print_json
    from vlm.folders import write_atomic

    base = Allowances.load(allowances) if allowances else Allowances()
    changes = given(max_drop=max_drop, max_slowdown=max_slowdown, ignore=ignore)
    verdict = judge.gate(new, baseline, Allowances.parse({**base.model_dump(), **changes}, "pocketvlm gate"))
    judge.save(verdict, new)
    if markdown:
        write_atomic(markdown, judge.markdown(verdict))
    if as_json:
        print_json(verdict.record())
    else:
        out().print(judge.table(verdict))
        print(f"Gate: {verdict.state}", *verdict.reasons, *verdict.notes, sep="\n  ")
    raise typer.Exit(verdict.exit_code)
