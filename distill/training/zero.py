"""DeepSpeed's ZeRO: its settings, and the weights of a module that it has split over the processes."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor, nn

from distill.config import DistillConfig
from vlm.errors import UserError, install_hint


def prepare_deepspeed(config: DistillConfig) -> None:
    """See that DeepSpeed is there, knows its settings, and compiles nothing.

    Raises:
        UserError: it is not installed, or does not know a setting.
    """
    try:
        import deepspeed
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except ImportError as error:
        raise UserError(f"zero needs deepspeed, which is not installed: {install_hint('distill')}") from error
    if not torch.cuda.is_available():
        # DeepSpeed would compile a faster all-reduce for processes of one machine, which needs a compiler and minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    assert config.zero is not None
    try:
        DeepSpeedZeroConfig.model_validate(config.zero.settings)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(
            f"zero.settings: {wrong['loc'][0]}: {wrong['input']!r} found, which DeepSpeed {deepspeed.__version__} does "
            f"not take ({wrong['msg']}). Its documentation of zero_optimization lists the names and values."
        ) from error


def deepspeed_settings(config: DistillConfig) -> dict[str, Any]:
    """DeepSpeed's configuration; torch's AdamW everywhere, so that nothing is compiled."""
    assert config.zero is not None
    zero: dict[str, Any] = {"stage": config.zero.stage, "overlap_comm": torch.cuda.is_available()}
    place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.zero.offload != "none":
        zero["offload_optimizer"] = place
    if config.zero.offload == "all":
        zero["offload_param"] = place
    if config.zero.stage == 3:  # else the Trainer has DeepSpeed write its checkpoint a second time in their place
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_optimization": {**zero, **config.zero.settings},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def let_go(module: nn.Module, accelerator: Accelerator) -> None:
    """End DeepSpeed's engine and empty the module, to which DeepSpeed keeps references for ever."""
    accelerator.free_memory()
    for parameter in module.parameters():
        vars(parameter).clear()  # the parts of ZeRO-3, and the optimizer
        parameter.data, parameter.grad = torch.empty(0), None


def whole_state(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The weights on the CPU, gathered where ZeRO-3 has split them, in float32 where ZeRO's optimizer has them so.

    Every process must call this.

    Args:
        module: what was trained.
        keep: whether this process wants them; the others help to gather, and get nothing.
    """
    state = {}
    named: dict[str, Any] = dict(module.named_parameters())
    for name, value in module.state_dict().items():
        whole = _whole(named[name]) if name in named else value
        if keep:
            state[name] = whole.detach().cpu().contiguous()
    return state


def _whole(parameter: Any) -> Tensor:
    """A parameter as the optimizer has it, or as it is if that is all there is."""
    split = hasattr(parameter, "ds_id")
    if not split and not hasattr(parameter, "_hp_mapping"):
        return parameter
    import deepspeed

    master: Tensor | None = deepspeed.utils.safe_get_full_fp32_param(parameter)
    if master is not None:
        return master
    with deepspeed.zero.GatheredParameters([parameter]):  # frozen: no optimizer has it
        return parameter.detach().clone()
