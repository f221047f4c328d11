"""transformers' Trainer with learning rates per part, probes of the terms, and means that do not depend on how a batch
is divided over processes and accumulation."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from distill.adapters import LEARNED
from distill.config import DistillConfig, Stage
from distill.data.batches import sampler_for
from distill.model import AlignKD
from distill.training.balance import connected, probe, stop_if_dead
from distill.training.history import rows_of
from distill.training.processes import Processes
from distill.training.shares import shares
from distill.training.zero import deepspeed_settings
from vlm.children import say
from vlm.errors import CheckFailed, UserError
from vlm.folders import write_atomic

COMPLETE = "complete"  # file of a checkpoint that every process has finished
LEARNED_RATE = 0.02  # of a learned weight's logarithm: Beta-KD's code has 1000 times its model's 2e-5
CHECK_STEPS = 10  # from one count of what the data workers could not read to the next


class DistillTrainer(Trainer):
    """Trains an `AlignKD` module; every `probe_steps` steps it measures each term's gradient on the student.

    Args:
        module: what is trained.
        config: the run's configuration.
        stage: the stage that is trained.
        done: steps of the stages before.
        total: steps of all stages.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, module: AlignKD, config: DistillConfig, stage: Stage, done: int, total: int, **kwargs: Any
    ) -> None:
        super().__init__(model=module, **kwargs)
        self.remove_callback(PrinterCallback)  # stdout belongs to ProgressLines
        self.module, self.config, self.stage, self.done, self.total = module, config, stage, done, total
        self.model_accepts_loss_kwargs = False  # losses are means: the Trainer divides by the accumulation
        self.probed = -1  # the last step that was probed

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """The order that the stage's data ask for (distill.data.batches), else the Trainer's own."""
        batches_per_step = self.args.world_size * self.args.gradient_accumulation_steps
        own = sampler_for(self.train_dataset, self.args.train_batch_size, batches_per_step, self.config.seed)
        return super()._get_train_sampler(train_dataset) if own is None else own

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The batches of one step, each told its share in the step's means (distill.training.shares)."""
        try:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        except UserError as error:  # a data worker's comes with the worker's traceback before its message
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
        if self.config.data_workers and self.state.global_step % CHECK_STEPS == 0:
            self.train_dataset.check()  # what the data workers could not read
        if batches and (self.args.world_size > 1 or len(batches) > 1):
            for batch, share in zip(batches, shares(self.module, batches, self.args), strict=True):
                batch["shares"] = share
        return batches, None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for each group of parameters."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                parameter_groups(self.module, self.stage),
                betas=self.config.betas,
                weight_decay=self.config.weight_decay,
                fused=True,
            )
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Loss of a batch; on a probe step also measures and logs the terms."""
        step = self.state.global_step
        self.module.progress = (self.done + step) / self.total
        outputs = model(**inputs)
        if step % self.config.probe_steps == 0 and step != self.probed:
            self.probed = step
            # DeepSpeed reduces gradients whenever what its engine returned is differentiated, and with ZeRO-3 a graph
            # can be gone through once: there each term gets a forward pass of its own, beside the engine.
            again = (lambda: connected(self.module(**inputs))) if self.config.zero else None
            row = probe(self.module, outputs, step == 0, again)
            self.log({**row, "probe_rate": self._get_learning_rate()})
            if self.config.stop_dead_terms:
                stop_if_dead([row["terms"] for row in rows_of(self.state.log_history, self.stage.name, self.done)])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        """Record values; a loss that is no number ends the run.

        Raises:
            CheckFailed: it is NaN or infinite.
        """
        for name, value in logs.items():
            if name.endswith(("loss", "_value")) and not math.isfinite(value):
                raise CheckFailed(
                    f"{name} is {value} at step {self.done + self.state.global_step}: the training diverged and was "
                    f"stopped. Lower the learning rate ({self.stage.learning_rate} in stage {self.stage.name}), or use "
                    "precision bf16 where it is fp16. The last checkpoint before it is kept."
                )
        super().log(logs, *arguments)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint counts from the moment on at which every process has written its part."""
        super()._save_checkpoint(model, trial)
        Processes.from_launcher().wait()
        if self.args.should_save:
            write_atomic(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}" / COMPLETE, "")


def parameter_groups(module: AlignKD, stage: Stage) -> list[dict[str, Any]]:
    """What trains, and how fast: the student, its projector and the adapters, and the logarithms of learned weights.

    Returns:
        Groups for an optimizer; the last one is left out where no weight is learned.
    """
    student: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    learned: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and name.startswith("adapters." + LEARNED):
            learned.append(parameter)
        elif parameter.requires_grad:
            is_fast = name.startswith("adapters.") or "multi_modal_projector" in name
            (fast if is_fast else student).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": student, "lr": stage.learning_rate},
        {"params": fast, "lr": stage.projector_learning_rate or stage.learning_rate},
    ]
    return groups + ([{"params": learned, "lr": LEARNED_RATE, "weight_decay": 0.0}] if learned else [])


class ProgressLines(TrainerCallback):
    """Prints one JSON line every few steps, for the process that watches."""

    def __init__(self, stage: str, done: int, total: int) -> None:
        self.stage, self.done, self.total = stage, done, total

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report steps done over all stages."""
        if state.is_world_process_zero and (state.global_step % 10 == 0 or state.global_step == state.max_steps):
            say(stage=self.stage, step=self.done + state.global_step, steps=self.total)


class Clock(TrainerCallback):
    """Time of training over all processes that followed each other, kept in a file at every checkpoint.

    Attributes:
        file: a JSON list, seconds on the wall and seconds of this process's processors. The second do not grow while
            other work has the machine.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        before = json.loads(file.read_text()) if file.is_file() else (0.0, 0.0)
        self._origin = [now - then for now, then in zip(self._now(), before, strict=True)]

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.monotonic(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """Until now, on the wall and of the processors."""
        wall, processor = (round(now - origin, 1) for now, origin in zip(self._now(), self._origin, strict=True))
        return {"seconds": wall, "processor_seconds": processor}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time with a checkpoint: what comes after it is done again, and counted then."""
        if state.is_world_process_zero:
            self.note()

    def note(self) -> None:
        """Write the time into the file."""
        write_atomic(self.file, json.dumps(list(self.seconds().values())))


def training_arguments(config: DistillConfig, stage: Stage, steps: int, out: Path, who: Processes) -> TrainingArguments:
    """Trainer's arguments for one stage.

    Args:
        config: the run.
        stage: the stage, `steps` long.
        steps: its length in optimiser steps.
        out: folder of the checkpoints.
        who: the processes.
    """
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=stage.per_process(who.count),
        gradient_accumulation_steps=stage.gradient_accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(stage.warmup * steps)),
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        use_cpu=not gpu,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # `log` ends such a run
        save_steps=config.checkpoint_steps,
        save_total_limit=2,
        save_only_model=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        dataloader_num_workers=config.data_workers,
        ddp_backend=("nccl" if gpu else "gloo") if who.count > 1 else None,
        ddp_find_unused_parameters=False if who.count > 1 else None,
        deepspeed=deepspeed_settings(config) if config.zero else None,
    )
