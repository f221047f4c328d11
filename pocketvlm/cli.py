"""The command line. Commands import what they need when they are called, so that `--help` answers at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pocketvlm import __version__, console
from pocketvlm.commands import (
    ablate,
    analyze,
    ask,
    bench,
    bundle,
    convert,
    distill,
    doctor,
    evaluate,
    export,
    gate,
    report,
    run,
    sensitivity,
)

app = typer.Typer(
    help="Distil a vision-language model, export it to ONNX, ExecuTorch, Core ML and GGUF, prove and measure each.",
    epilog="Exit codes: 0 done, 1 the work ran and its check failed, 2 you must change something (it says what).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("distill")(distill.distill)
app.command("convert")(convert.convert)
app.command("export")(export.export)
app.command("ask")(ask.ask)
app.command("bench")(bench.bench)
app.command("bundle")(bundle.bundle)
app.command("eval")(evaluate.evaluate)
app.command("ablate")(ablate.ablate)
app.command("analyze")(analyze.analyze)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("gate")(gate.gate)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)


def _version(show: bool) -> None:
    if show:
        print(f"pocketvlm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an internal error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Options that stand before the command; `main` reads --debug itself, as it outlives the command."""


def main() -> None:
    """Run the command line and exit with its code."""
    with console.exit_codes(debug="--debug" in sys.argv), console.ended_gently():
        app(prog_name="pocketvlm")
