"""The process that trains or evaluates one cell: `python -m pocketvlm.study.job FOLDER train|validation|test`.

Says where it is in JSON lines on standard output, and ends when its standard input does: with the study's process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

from pocketvlm.console import CHECK_FAILED, DONE, USER_ERROR
from pocketvlm.ledger import Ledger
from pocketvlm.pipeline import RunConfig
from pocketvlm.study.cells import CONFIG, Cell
from pocketvlm.study.config import Split
from vlm.children import end_with_parent, say
from vlm.errors import CheckFailed, UserError
from vlm.folders import locked

SPLITS: tuple[Split, ...] = get_args(Split)


def work(folder: Path, task: str) -> None:
    """Do one task of the cell in `folder`."""
    config = RunConfig.load(folder / CONFIG)
    cell = Cell(config.name, config.distill.seed, config, folder)
    split = next((split for split in SPLITS if split == task), None)
    step = cell.evaluation(split) if split else cell.training()
    with locked(folder / ".lock", wait=False):
        Ledger(folder).build(step, lambda fraction, message: say(fraction=fraction, message=message))


def main() -> int:
    """Entry point; the exit codes are the command line's."""
    end_with_parent()
    try:
        work(Path(sys.argv[1]), sys.argv[2])
    except (CheckFailed, UserError) as error:
        say(failed=str(error))
        return CHECK_FAILED if isinstance(error, CheckFailed) else USER_ERROR
    return DONE


if __name__ == "__main__":
    sys.exit(main())
