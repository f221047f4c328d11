"""One stage of a training: its length, its checkpoints, its weights afterwards."""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from distill.build import build, computing_device, computing_dtype
from distill.config import DistillConfig, Stage
from distill.data.batches import sampler_for
from distill.data.rows import Rows
from distill.model import AlignKD
from distill.teacher.live import Teacher
from distill.teacher.signals import TeacherSignals
from distill.training.forecast import forecast
from distill.training.processes import Processes
from distill.training.trainer import COMPLETE, Clock, DistillTrainer, ProgressLines, training_arguments
from distill.training.zero import let_go, whole_state
from vlm.errors import UserError, install_hint
from vlm.folders import write_atomic


@dataclass(frozen=True)
class Plan:
    """What a stage trains on and where it stands in the run.

    Attributes:
        stage, rows: its configuration and data.
        steps: its length; done: steps of the stages before; total: of all stages.
        work: folder of checkpoints and of what is kept; events: of TensorBoard's.
    """

    stage: Stage
    rows: Rows
    steps: int
    done: int
    total: int
    work: Path
    events: Path

    @property
    def finished(self) -> Path:
        """The weights after the stage."""
        return self.work / f"{self.stage.name}.safetensors"

    @property
    def log(self) -> Path:
        """The Trainer's log of the stage, written when all else is."""
        return self.work / f"{self.stage.name}.json"


def stage_steps(config: DistillConfig, stage: Stage, rows: Rows, who: Processes) -> int:
    """Length of a stage in optimiser steps.

    Raises:
        UserError: a batch cannot be divided among the processes.
    """
    parts = who.count * stage.gradient_accumulation
    if stage.batch_size % parts:
        raise UserError(
            f"stage {stage.name}: batch_size {stage.batch_size} found, a multiple of {who.count} processes x "
            f"gradient_accumulation {stage.gradient_accumulation} = {parts} expected: all have the same share of it."
        )
    if stage.steps:
        return stage.steps
    assert stage.epochs
    sampler = sampler_for(rows, stage.per_process(who.count), parts, config.seed)
    items = len(rows) if sampler is None else len(sampler)  # type: ignore[arg-type]
    return max(1, round(stage.epochs * -(-items // stage.batch_size)))


def train_stage(module: AlignKD, config: DistillConfig, plan: Plan, clock: Clock, who: Processes) -> list[dict]:
    """Train one stage and return the Trainer's log; a finished stage is loaded, an interrupted one goes on."""
    if plan.log.is_file():
        module.load_state_dict(load_file(plan.finished))
        return list(json.loads(plan.log.read_text()))
    _say_forecast(module, config, plan, who)
    _keep_computed(module, plan, who)
    checkpoints = plan.work / plan.stage.name
    with _tower_apart(module, config) if config.zero or torch.cuda.is_available() else nullcontext():
        trainer = DistillTrainer(
            module,
            config,
            plan.stage,
            plan.done,
            plan.total,
            args=training_arguments(config, plan.stage, plan.steps, checkpoints, who),
            train_dataset=plan.rows,
            data_collator=plan.rows.batch,
            callbacks=[ProgressLines(plan.stage.name, plan.done, plan.total), clock, *_tensorboard(config, plan, who)],
        )
        trainer.train(resume_from_checkpoint=last_complete(checkpoints))
    plan.rows.check()  # of all processes and their data workers
    weights = whole_state(module, who.first)
    if config.zero:
        let_go(module, trainer.accelerator)
    log: list[dict] = trainer.state.log_history
    if who.first:
        save_file(weights, plan.finished)
        clock.note()
        write_atomic(plan.log, json.dumps(log))
    who.wait()
    return log


@contextmanager
def _tower_apart(module: AlignKD, config: DistillConfig) -> Iterator[None]:
    """Keep the frozen vision tower out of what is trained and saved, whole in every process.

    ZeRO-3 would gather it whenever it runs, and it does not run in every process at the same time: one has a batch of
    text alone, another finds its images' features kept; those that gather would wait for those that do not.
    """
    owner = module.student.model
    tower = owner.vision_tower
    del owner.vision_tower
    try:
        with module.tower.computing(computing_device(), computing_dtype(config)):
            yield
    finally:
        owner.vision_tower = tower


def rebuilt(config: DistillConfig, plan: Plan, teacher: TeacherSignals | None) -> AlignKD:
    """The module after a stage with ZeRO, as the next one can begin with it: DeepSpeed leaves its own hooks and types
    in the old one, of which nobody should hold anything any more when this is called."""
    unset_hf_deepspeed_config()
    gc.collect()
    fresh, _, _ = build(config, teacher)
    fresh.load_state_dict(load_file(plan.finished))
    return fresh


def last_complete(checkpoints: Path) -> str | None:
    """The newest checkpoint that every process has finished."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    return next((str(folder) for folder in found if (folder / COMPLETE).is_file()), None)


def _keep_computed(module: AlignKD, plan: Plan, who: Processes) -> None:
    """Keep what is computed once in files, so that a resumed run reads the same numbers (distill.kept)."""
    module.tower.keep_in(plan.work / f"features-{who.rank}.kept")
    if isinstance(module.teacher, Teacher):
        module.teacher.keep_in(plan.work / f"answers-{who.rank}.kept")


def _tensorboard(config: DistillConfig, plan: Plan, who: Processes) -> list[TrainerCallback]:
    """What writes the stage's losses, rates and probes where TensorBoard finds them.

    Raises:
        UserError: it is wanted and not installed.
    """
    if not config.tensorboard or not who.first:
        return []
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"tensorboard: it is not installed: {install_hint('distill')}") from error
    return [TensorBoardCallback(SummaryWriter(str(plan.events / plan.stage.name)))]


def _say_forecast(module: AlignKD, config: DistillConfig, plan: Plan, who: Processes) -> None:
    teacher = module.teacher
    held = sum(p.numel() for p in teacher.model.parameters()) if isinstance(teacher, Teacher) else 0
    expected = forecast(config, plan.stage, module.student, held, who)
    if who.first:
        print(f"stage {plan.stage.name}: {expected.text()}", file=sys.stderr, flush=True)
    expected.refuse_if_hopeless()
