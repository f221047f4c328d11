"""transformers' Trainer with three additions: learning rates per part, gradient norms per term, automatic weights."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from distill.config import DistillConfig, Stage
from distill.model import SUPERVISED, AlignKD

SMOOTHING = 0.5  # of an automatic weight: half old, half new


class DistillTrainer(Trainer):
    """Trains an `AlignKD` module; every `probe_steps` steps it measures each term's gradient on the student."""

    optimizer: torch.optim.Optimizer | None

    def __init__(self, module: AlignKD, config: DistillConfig, stage: Stage, **kwargs: Any) -> None:
        super().__init__(model=module, **kwargs)
        self.remove_callback(PrinterCallback)  # stdout belongs to ProgressLines
        self.module, self.config, self.stage = module, config, stage

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
        outputs = model(**inputs)
        if self.state.global_step % self.config.probe_steps == 0:
            self._probe(outputs["terms"], outputs["loss"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _probe(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        norms = {name: self._gradient_norm(value) for name, value in terms.items()}
        row: dict[str, float] = {"probe_loss": float(loss.detach())}
        for name, value in terms.items():
            weight = 1.0 if name == SUPERVISED else float(self.module.weight(name))
            row |= {f"{name}_value": float(value.detach()), f"{name}_grad_norm": norms[name], f"{name}_weight": weight}
            share = None if name == SUPERVISED else self.module.terms[name].weight.share
            if share is not None and norms[name] > 0:  # 0: a batch that says nothing of this term, as text alone
                wanted = share * norms[SUPERVISED] / max(norms[name], 1e-12)
                wanted = min(wanted, self.module.terms[name].weight.cap)
                first = self.state.global_step == 0
                self.module.weight(name).fill_(wanted if first else SMOOTHING * (weight + wanted))
        self.log(row)

    def _gradient_norm(self, value: Tensor) -> float:
        if not value.requires_grad:
            return 0.0
        parameters = self.module.student_parameters()
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        squares = [g.float().square().sum() for g in gradients if g is not None]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


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
