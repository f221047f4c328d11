"""`pocketvlm ablate`: rows of a study, trained with several seeds and compared in pairs."""

from pathlib import Path
from typing import Annotated

import typer


def ablate(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study, see studies/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Changes to it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the study instead of runs/<name>.")] = None,
    read_test_again: Annotated[
        bool, typer.Option("--read-test-again", help="Let a changed study read the test split.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print study.json.")] = False,
) -> None:
    """Train named rows over seeds and compare them in pairs; a killed study goes on where it stood."""
    from pocketvlm.console import print_json
    from pocketvlm.study.config import StudyConfig
    from pocketvlm.study.run import study as run_study

    config = StudyConfig.load(study, overrides)
    folder = out or Path("runs") / config.name
    result = run_study(config, study, folder, quiet=as_json, read_again=read_test_again)
    if as_json:
        print_json(result)
    else:
        print((folder / "study.md").read_text())
        print(f"Study: {folder / 'study.md'}, {folder / 'study.json'}")
