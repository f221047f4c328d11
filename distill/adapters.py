"""What is trained beside the student and thrown away: maps between the two models, and learned weights."""

import math

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from distill.config import DistillConfig
from distill.teacher.signals import TeacherSignals

LEARNED = "log_weight_"  # prefix of the adapters that hold a learned weight's logarithm


class Held(nn.Module):
    """A trained tensor that a call hands out: only inside a module's forward does ZeRO-3 gather its parameters."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        """The tensor."""
        return self.value.clone()


def adapters(
    config: DistillConfig, teacher: TeacherSignals | None, student: LlavaForConditionalGeneration
) -> nn.ModuleDict:
    """P_attn for each pair of layers, P_V, P_switch, and the learned weights' logarithms."""
    found = nn.ModuleDict()
    text = student.config.text_config
    if teacher and config.attention:
        shape = (len(config.attention.student_layers), text.num_attention_heads, teacher.heads)
        found["attention"] = Held(torch.randn(shape) / math.sqrt(teacher.heads))  # P_attn, [pairs, H_S, H_T]
    if teacher and config.vision_tokens:
        found["vision"] = nn.Linear(teacher.width, text.hidden_size)  # P_V, [D_S, D_T] and [D_S]
    if teacher and config.switch:
        found["switch"] = nn.Linear(text.hidden_size, teacher.width)  # P_switch, [D_T, D_S] and [D_T]
    found.requires_grad_(config.train_adapters)
    for name, term in config.terms.items():
        if teacher and term.weight.learned is not None:
            found[LEARNED + name] = Held(torch.zeros(1))  # DeepSpeed takes no scalars
    return found


def nothing(adapter: nn.Module) -> Tensor:
    """Zero, with a gradient to the adapter: of a term that is off, for which data-parallel training would wait."""
    if isinstance(adapter, nn.Linear):
        return adapter(adapter.weight.new_zeros(0, adapter.in_features)).sum() * 0.0
    return adapter().sum() * 0.0
