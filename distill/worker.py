"""The process that trains one student: `python -m distill.worker CONFIG.yaml OUT`. Prints progress as JSON lines."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from distill.balance import reports
from distill.build import build
from distill.config import DistillConfig, Stage
from distill.history import rows_of
from distill.model import AlignKD
from distill.quarantine import Quarantine
from distill.rows import Rows
from distill.trainer import DistillTrainer, ProgressLines, training_arguments
from vlm.data.collator import Encoder
from vlm.errors import UserError
from vlm.folders import finished_folder, write_atomic
from vlm.models.checkpoint import save_checkpoint


def train(config: DistillConfig, out: Path) -> None:
    """Train all stages into the folder `out`; what an interrupted run left in `<out>.partial` is used."""
    partial = out.with_name(out.name + ".partial")
    same = (partial / "config.yaml").is_file() and (partial / "config.yaml").read_text() == config.dump()
    with finished_folder(out, resume=same) as folder:
        write_atomic(folder / "config.yaml", config.dump())
        work = folder / "work"
        started = time.monotonic()
        torch.set_num_threads(config.threads)
        module, tokenizer_folder, encoder = build(config)
        rows, left_out, done = [], [], 0
        total = sum(stage.steps for stage in config.stages)
        for stage in config.stages:
            rows += rows_of(train_stage(module, config, stage, encoder, work, done, total), stage.name, done)
            left_out += _quarantine(work, stage).report()
            done += stage.steps
        save_checkpoint(module.student, tokenizer_folder, module.tower.preprocessing, folder)
        history = {
            "seed": config.seed,
            "seconds": round(time.monotonic() - started, 1),
            "steps": done,
            "terms": ["sup", *module.terms],
            "rows": rows,
            "reports": reports(rows) + left_out,
        }
        (folder / "history.json").write_text(json.dumps(history))
        for path in sorted(work.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        work.rmdir()


def train_stage(
    module: AlignKD, config: DistillConfig, stage: Stage, encoder: Encoder, work: Path, done: int, total: int
) -> list[dict]:
    """Train one stage and return the Trainer's log; a finished stage is loaded, an interrupted one goes on."""
    finished = work / f"{stage.name}.safetensors"
    log = work / f"{stage.name}.json"
    if log.is_file():
        module.load_state_dict(load_file(finished))
        return list(json.loads(log.read_text()))
    checkpoints = work / stage.name
    work.mkdir(exist_ok=True)
    rows = Rows(stage, encoder, _quarantine(work, stage))
    trainer = DistillTrainer(
        module,
        config,
        stage,
        done,
        total,
        args=training_arguments(config, stage, checkpoints),
        train_dataset=rows,
        data_collator=rows.batch,
        callbacks=[ProgressLines(stage.name, done, total)],
    )
    trainer.train(resume_from_checkpoint=_last_complete(checkpoints))
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, finished)
    write_atomic(log, json.dumps(trainer.state.log_history))
    return list(trainer.state.log_history)


def _quarantine(work: Path, stage: Stage) -> Quarantine:
    """The list of what a stage cannot use; it stays in the finished folder."""
    return Quarantine(work.parent / "quarantine", stage.name)


def _last_complete(checkpoints: Path) -> str | None:
    """The newest checkpoint whose trainer_state.json, written last, is whole."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for folder in found:
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


def _stop_with_parent() -> None:
    """End this process when stdin closes, that is when the process that started it is gone."""
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    """Entry point; exit code 2 for what the user must change."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    file, out = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        train(DistillConfig.load(file), out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
