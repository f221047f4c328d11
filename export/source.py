"""Where the weights of an export come from: a checkpoint whose tensors stay in their files until they are asked for.

The model has its parameters as they are stored (usually float16), as memory-mapped views of the safetensors files:
opening costs no memory at any size. Whatever computes with them takes float32 copies of the parts it needs, one at a
time.
"""

import copy
import ctypes
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, LlavaForConditionalGeneration

from vlm.errors import UserError
from vlm.manifest import Facts
from vlm.models.checkpoint import SUPPORTED, Checkpoint, load_checkpoint
from vlm.models.hub import read_config
from vlm.models.prepared import prepared

_MAPS, _WEIGHTS, _DONT_NEED = Path("/proc/self/maps"), ".safetensors", 4  # MADV_DONTNEED of madvise(2)
# What export/graph.py describes: a LLaMA decoder behind a CLIP tower; one layer of it is read, without class token.
EXPORTED = {
    "text_config.model_type": ("llama",),
    "vision_config.model_type": ("clip_vision_model",),
    "vision_feature_select_strategy": ("default",),
    "vision_feature_layer": ("int",),
}


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
    """Open a checkpoint with its weights as they are stored, in their files; see `vlm.models.checkpoint`.

    Raises:
        UserError: also where a part of the model is of a kind that export/graph.py does not describe.
    """
    _refuse_unknown(prepared(folder))
    return load_checkpoint(folder, dtype="auto")


def _refuse_unknown(folder: Path) -> None:
    if read_config(folder).get("model_type") not in SUPPORTED:
        return  # load_checkpoint says so
    config = AutoConfig.from_pretrained(folder)
    found = {
        "text_config.model_type": config.text_config.model_type,
        "vision_config.model_type": config.vision_config.model_type,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_feature_layer": type(config.vision_feature_layer).__name__,
    }
    if wrong := [f"{key} {value!r}" for key, value in found.items() if value not in EXPORTED[key]]:
        known = "; ".join(f"{key} {' or '.join(map(repr, values))}" for key, values in EXPORTED.items())
        raise UserError(
            f"{folder / 'config.json'}: {', '.join(wrong)} cannot be exported. Supported: {known}. "
            "Describe the architecture in export/graph.py and add it to export.source.EXPORTED."
        )


def in_float32(module: nn.Module) -> nn.Module:
    """Copy a module in float32, which is what graphs are traced and vision towers are rounded in."""
    return copy.deepcopy(module).float().eval()


def release_pages(checkpoint: Checkpoint) -> None:
    """Give back the memory of weights that were read; what is asked for again is read from its file again.

    Only pages that map the files of this checkpoint are let go, and only where the system says what is mapped (Linux).
    """
    if not _MAPS.is_file():
        return
    places = [parameter.data_ptr() for parameter in checkpoint.model.parameters()]
    for line in _MAPS.read_text().splitlines():
        if line.endswith(_WEIGHTS):
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            if any(begin <= place < end for place in places):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONT_NEED)


def release_heap() -> None:
    """Give memory that is free but kept by the allocator back to the system, where it can (glibc).

    What an exporter leaves behind in cycles and holes would otherwise be on top of the next one's peak.
    """
    gc.collect()
    if _MAPS.is_file() and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def names_in(checkpoint: Checkpoint, module: nn.Module) -> dict[str, str]:
    """Parameter names of a module that shares the checkpoint's parameters -> the checkpoint's names for them."""
    theirs = {id(parameter): name for name, parameter in checkpoint.model.named_parameters()}
    return {name: theirs[id(parameter)] for name, parameter in module.named_parameters()}


def with_weights(checkpoint: Checkpoint, weights: dict[str, torch.Tensor]) -> Checkpoint:
    """Copy a checkpoint in float32 with some of its parameters replaced; what is float32 already is shared.

    Args:
        checkpoint: stays as it is.
        weights: parameter name -> values of the same shape.
    Raises:
        ValueError: a name or a shape the model does not have; the format that made them is wrong.
    """
    old = checkpoint.model
    model = copy.deepcopy(old, {id(parameter): parameter for parameter in old.parameters()})
    found = dict(old.named_parameters(remove_duplicate=False))
    for name, value in weights.items():
        if name not in found or found[name].shape != value.shape:
            expected = str(list(found[name].shape)) if name in found else "no such parameter"
            raise ValueError(f"{name}: {list(value.shape)} was read from the artifact, the model has {expected}.")
    for name, parameter in found.items():
        if name in weights or parameter.dtype != torch.float32:
            owner_name, _, leaf = name.rpartition(".")
            values = weights.get(name, parameter.detach()).float()
            # Not new values in the old one: embedding and head may share one parameter and be rounded differently.
            setattr(model.get_submodule(owner_name), leaf, nn.Parameter(values, requires_grad=False))
    return replace(checkpoint, model=model)
