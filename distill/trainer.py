"""transformers' Trainer with two additions: learning rates per part, and probes of the terms (distill.balance)."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from distill.balance import probe, stop_if_dead
from distill.batches import sampler_for
from distill.config import DistillConfig, Stage
from distill.history import rows_of
from distill.model import AlignKD


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

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """The order that the stage's data ask for (distill.batches), else the Trainer's own."""
        batches_per_step = self.args.world_size * self.args.gradient_accumulation_steps
        own = sampler_for(self.train_dataset, self.args.train_batch_size, batches_per_step, self.config.seed)
        return super()._get_train_sampler(train_dataset) if own is None else own

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with the projector and the adapters at the projector's learning rate."""
        if self.optimizer is None:
            fast = self.stage.projector_learning_rate or self.stage.learning_rate
            named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
            is_fast = [n.startswith("adapters.") or "multi_modal_projector" in n for n, _ in named]
            groups = [
                {"params": [p for (_, p), f in zip(named, is_fast, strict=True) if f == wanted], "lr": rate}
                for wanted, rate in ((False, self.stage.learning_rate), (True, fast))
            ]
            self.optimizer = torch.optim.AdamW(
                groups, betas=self.config.betas, weight_decay=self.config.weight_decay, fused=True
            )
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Loss of a batch; on a probe step also measures and logs the terms."""
        step = self.state.global_step
        self.module.progress = (self.done + step) / self.total
        outputs = model(**inputs)
        if step % self.config.probe_steps == 0:
            self.log(probe(self.module, outputs, first=step == 0))
            if self.config.stop_dead_terms:
                stop_if_dead([row["terms"] for row in rows_of(self.state.log_history, self.stage.name, self.done)])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


class ProgressLines(TrainerCallback):
    """Prints one JSON line every few steps, for the process that watches."""

    def __init__(self, stage: str, done: int, total: int) -> None:
        self.stage, self.done, self.total = stage, done, total

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report steps done over all stages."""
        if state.global_step % 10 == 0 or state.global_step == state.max_steps:
            line = {"stage": self.stage, "step": self.done + state.global_step, "steps": self.total}
            print(json.dumps(line), flush=True)


def training_arguments(config: DistillConfig, stage: Stage, out: Path) -> TrainingArguments:
    """Trainer's arguments for one stage."""
    return TrainingArguments(
        output_dir=str(out),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(stage.warmup * stage.steps)),
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=25,
        save_steps=config.checkpoint_steps,
        save_total_limit=2,
        save_only_model=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        dataloader_num_workers=0,
        deepspeed=config.deepspeed,
    )
