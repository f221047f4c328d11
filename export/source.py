"""Where the weights of an export come from: a checkpoint whose tensors stay in their files until they are asked for.

The model has its parameters as they are stored (usually float16), as memory-mapped views of the safetensors files:
opening costs no memory at any size. Whatever computes with them takes float32 copies of the parts it needs, one at a
time.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from vlm.errors import UserError
from vlm.manifest import Facts
from vlm.models.checkpoint import Checkpoint, load_checkpoint


class Weights:
    """A checkpoint's tensors by the model's parameter names, read when they are asked for.

    Args:
        folder: the checkpoint.
    Raises:
        UserError: `folder` holds no supported checkpoint, or no such parameter is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoint = open_checkpoint(folder)
        self.model: LlavaForConditionalGeneration = self.checkpoint.model
        self.config = self.model.config
        self.facts: Facts = self.checkpoint.facts
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    def __iter__(self) -> Iterator[str]:
        """The parameters' names, in the model's order; what is shared (a tied head) comes once."""
        return iter(self.shapes)

    def stored(self, name: str) -> torch.Tensor:
        """A view of the file: the type it is stored in, no memory of its own. Do not write into it."""
        try:
            return self.model.get_parameter(name).detach()
        except AttributeError as error:
            raise UserError(f"{self.checkpoint.folder}: the model has no parameter {name!r}.") from error

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A copy of a parameter in `dtype`."""
        return self.stored(name).to(dtype, copy=True)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint with its weights as they are stored, in their files; see `vlm.models.checkpoint`."""
    return load_checkpoint(folder, dtype="auto")


def in_float32(module: nn.Module) -> nn.Module:
    """Copy a module in float32, which is what graphs are traced and vision towers are rounded in."""
    return copy.deepcopy(module).float().eval()


def names_in(checkpoint: Checkpoint, module: nn.Module) -> dict[str, str]:
    """Parameter names of a module that shares the checkpoint's parameters -> the checkpoint's names for them."""
    theirs = {id(parameter): name for name, parameter in checkpoint.model.named_parameters()}
    return {name: theirs[id(parameter)] for name, parameter in module.named_parameters()}
