"""Low-rank updates of the decoder (peft): put in before the training, merged into the weights after it."""

from typing import Any

from torch import nn
from transformers import LlavaForConditionalGeneration

from distill.options import Lora
from vlm.errors import UserError, install_hint


def add_lora(student: LlavaForConditionalGeneration, lora: Lora) -> None:
    """Give the decoder's linear layers trainable low-rank updates and freeze everything else but the projector.

    Raises:
        UserError: peft is not installed, or the decoder has no layer of one of the names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"lora needs peft, which is not installed: {install_hint('distill')}") from error
    decoder = student.model.language_model
    names = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted(set(lora.targets) - names):
        raise UserError(
            f"lora.targets: the decoder has no linear layer {unknown[0]!r}, only {', '.join(sorted(names))}."
        )
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0)
    student.lm_head.requires_grad_(False)
    inject_adapter_in_model(settings, decoder)  # also freezes the rest of the decoder


def merge_lora(student: LlavaForConditionalGeneration) -> None:
    """Add the updates to the weights and put the plain layers back; nothing happens without updates."""
    decoder: Any = student.model.language_model
    for name, module in list(decoder.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge(safe_merge=True)
            parent, _, leaf = name.rpartition(".")
            setattr(decoder.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(decoder, "peft_config"):
        del decoder.peft_config
