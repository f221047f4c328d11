"""The process that trains one student, printing progress: `python -m distill.training.worker CONFIG.yaml OUT`.

Started once, or by a launcher (launch.py, docs/distributed.md) once per process of a distributed training.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from distill.build import build
from distill.config import DistillConfig, Stage
from distill.data.quarantine import Quarantine
from distill.data.rows import Rows
from distill.model import SUPERVISED, AlignKD
from distill.teacher.offline import offline
from distill.training.balance import reports
from distill.training.history import curve_of, rows_of
from distill.training.launch import FAILURE, PARENT
from distill.training.lora import merge_lora
from distill.training.processes import Processes, joined
from distill.training.stages import Plan, rebuilt, stage_steps, train_stage
from distill.training.trainer import Clock
from distill.training.zero import prepare_deepspeed
from vlm.children import end_with_parent, say
from vlm.data.collator import Encoder
from vlm.errors import CheckFailed, UserError
from vlm.folders import finished_folder, write_atomic
from vlm.models.checkpoint import save_checkpoint


def train(config: DistillConfig, out: Path) -> None:
    """Train all stages into the folder `out`; what an interrupted run left in `<out>.partial` is used."""
    torch.set_num_threads(config.threads)
    if config.zero:
        prepare_deepspeed(config)
    with joined(Processes.from_launcher()) as who, _folder(config, out, who) as folder:
        work = folder / "work"
        work.mkdir(exist_ok=True)
        clock = Clock(work / "seconds")
        module, tokenizer_folder, encoder = build(config)
        data = _data(config, module, encoder, folder, who)
        offline(config, module, tokenizer_folder, data, encoder.max_length, who)
        steps = {stage.name: stage_steps(config, stage, rows, who) for stage, rows in data}
        history, curve, done = [], [], 0
        for stage, rows in data:
            plan = Plan(stage, rows, steps[stage.name], done, sum(steps.values()), work, folder / "tensorboard")
            log = train_stage(module, config, plan, clock, who)
            history += rows_of(log, stage.name, done)
            curve += curve_of(log, done)
            if config.zero:
                teacher = module.teacher
                del module  # before the fresh one is there: two might not fit
                module = rebuilt(config, plan, teacher)
            done += plan.steps
        who.wait()  # nobody reads the last stage's weights any more
        if who.first:
            merge_lora(module.student)
            save_checkpoint(module.student, tokenizer_folder, module.tower.preprocessing, folder)
            left_out = [sentence for _, rows in data for sentence in rows.quarantine.report()]
            tree = {
                "seed": config.seed,
                **clock.seconds(),
                "steps": done,
                "terms": [SUPERVISED, *module.terms],
                "rows": history,
                "curve": curve,
                "reports": reports(history, module.terms) + left_out,
            }
            (folder / "history.json").write_text(json.dumps(tree))
            shutil.rmtree(work)
        who.wait()


@contextmanager
def _folder(config: DistillConfig, out: Path, who: Processes) -> Iterator[Path]:
    """The folder to write into; the first process makes it, and gives it its name when all are done."""
    partial = out.with_name(out.name + ".partial")
    if not who.first:
        who.wait()
        yield partial
        return
    same = (partial / "config.yaml").is_file() and (partial / "config.yaml").read_text() == config.dump()
    with finished_folder(out, resume=same) as folder:
        write_atomic(folder / "config.yaml", config.dump())
        who.wait()
        yield folder


def _data(
    config: DistillConfig, module: AlignKD, encoder: Encoder, folder: Path, who: Processes
) -> list[tuple[Stage, Rows]]:
    """The stages' records; the first process of a machine indexes and measures them, the others read that."""
    if who.local:
        who.wait()
    found = []
    for stage in config.stages:
        quarantine = Quarantine(folder / "quarantine", stage.name, who.rank)
        found.append((stage, Rows(stage, encoder, quarantine, module.tower.preprocessing, _say)))
    if not who.local:
        who.wait()
    return found


def _say(what: str, share: float) -> None:
    """Tell the process that watches how far the preparation of the data is."""
    say(stage=what, step=round(100 * share), steps=100, prepared=True)


def main() -> int:
    """Entry point; exit code 2 for what the user must change, 1 for a check that failed."""
    if os.environ.get(PARENT) == "stdin":
        end_with_parent()
    file, out = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        train(DistillConfig.load(file), out)
    except (UserError, CheckFailed) as error:
        failed = isinstance(error, CheckFailed)
        write_atomic(out.with_name(out.name + FAILURE), json.dumps({"message": str(error), "check": failed}))
        print(error, file=sys.stderr)
        return 1 if failed else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
