"""The process that trains, with a look at what it holds; writes seen.json beside the student's folder."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from torch.optim import AdamW
from transformers import TrainerCallback

from distill.build import build
from distill.model import AlignKD
from distill.training import stages, worker
from distill.training.trainer import DistillTrainer

SEEN: dict[str, Any] = {"steps": 0, "whole": [], "held_at_rebuild": None}


class Look(TrainerCallback):
    """Counts the steps and names the trained parameters that this process holds whole between two of them."""

    def __init__(self, module: AlignKD) -> None:
        self.module = module

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at every parameter: one that ZeRO-3 has split is empty here, and `ds_tensor` is this process's part."""
        SEEN["steps"] += 1
        for name, parameter in self.module.named_parameters():
            there: Any = parameter
            split = hasattr(there, "ds_tensor") and there.numel() == 0 and there.ds_tensor.numel() < there.ds_numel
            if not split and there.shape != () and name not in SEEN["whole"]:
                SEEN["whole"].append(name)


class LookingTrainer(DistillTrainer):
    """The trainer with a look after each step."""

    def __init__(self, module: AlignKD, *arguments: Any, **named: Any) -> None:
        super().__init__(module, *arguments, **named)
        self.add_callback(Look(module))


def rebuild(*arguments: Any) -> Any:
    """What `build` gives, after counting the numbers that the module and the optimizer of the stage before hold."""
    things = gc.get_objects()
    held = [p for thing in things if isinstance(thing, AlignKD) for p in thing.parameters()]
    held += [p for thing in things if isinstance(thing, AdamW) for group in thing.param_groups for p in group["params"]]
    SEEN["held_at_rebuild"] = sum(parameter.numel() for parameter in held)
    return build(*arguments)


if __name__ == "__main__":
    stages.DistillTrainer, stages.build = LookingTrainer, rebuild  # type: ignore[misc, assignment]
    code = worker.main()
    Path(sys.argv[2]).with_name("seen.json").write_text(json.dumps(SEEN))
    sys.exit(code)
