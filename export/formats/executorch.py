"""ExecuTorch: one model.pte with the methods vision_encoder, token_embedding and text_decoder, for XNNPACK.

The stock MultimodalRunner (executorch.extension.llm.runner) finds the methods and constants it looks for; it reads the
first output of vision_encoder and passes over the second, the patch features, which parity needs.
"""

import copy
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig
from executorch.exir.passes import MemoryPlanningPass
from torch import nn
from torch.export import Dim
from transformers import PreTrainedConfig

from export._executorch_backends import backend, partitioner
from export._executorch_lowering import COMPILE, forget, lower
from export._executorch_modules import ByteEmbedding, CachedDecoder, WeightOnlyLinear
from export._executorch_rounding import byte_weight, nibble_weight
from export._executorch_weights import byte_embedding, linear_weights, read_program
from export.calibration import LayerInputs
from export.formats.base import Cost, Written
from export.graph import Decoder, TokenEmbedding, VisionEncoder
from export.precision import resolve, uniform
from export.source import in_float32, release_pages
from vlm.errors import CheckFailed
from vlm.manifest import Precision
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes.executorch import MODEL

ENGINE = "executorch"
COST = Cost(memory=4.5, seconds=90e-9, vision=4.0)
GROUPS = {"8da4w": 32, "8da4w-128": 128}  # columns of a 4-bit weight that share a scale
PRESETS = {
    "fp32": uniform("fp32"),
    "8da8w": uniform("8da8w", vision="fp32", projector="fp32", embedding="int8"),
    **{name: uniform(name, vision="fp32", projector="fp32", embedding="int8") for name in GROUPS},
    "coreml": uniform("fp32", vision="fp16", projector="fp16"),
    "vulkan": uniform("fp16"),
}
PRECISIONS = tuple(PRESETS)
STORAGES = {
    "vision": ("fp32", "int8", "8da8w"),
    "projector": ("fp32", "int8", "8da8w"),
    "embedding": ("fp32", "int8"),
    "decoder": ("fp32", "8da8w", *GROUPS),
    "head": ("fp32", "8da8w", *GROUPS),
}
SAME_WEIGHT = 0.9  # least cosine of a weight read back with the one it came from; another of its shape has about 0
PREFIX = 8  # rows that are enough to tell weights apart
FLOATS = {"fp32", "fp16"}
# A tower's layers that read floats where the others' inputs are rounded: softmax exponentiates the errors of queries
# and keys, and the first layer's go through all others. The built-in student's tower, whose first layer looks at single
# neighbours, fails its parity without them.
SENSITIVE = re.compile(r"vision_tower\..*layers\.(0\.|\d+\.self_attn\.[qk]_proj)")


def write(
    checkpoint: Checkpoint, precision: str, folder: Path, context_length: int, inputs: LayerInputs | None = None
) -> Written:
    """Write model.pte into `folder`.

    Args:
        checkpoint: the model, in any type; it is not changed. Rounded linears are float32 one at a time.
        precision: one of PRESETS, with exceptions; see export.precision. 8da4w: 4-bit weights in groups of 32 and 8-bit
            activations scaled per token; 8da8w: 8-bit weights with a scale per row; int8: these with float activations,
            also SENSITIVE layers of 8da8w.
        folder: an existing folder.
        context_length: longest sequence, S, in tokens.
        inputs: what the decoder's matrices are multiplied with; see export.formats.base.
    """
    stored = resolve(precision, PRESETS, STORAGES)
    modules, interfaces = _modules(checkpoint, stored, context_length, inputs), _interfaces(checkpoint, context_length)
    lowered = {}
    for method, build in modules.items():
        lowered[method] = lower(build(), *interfaces[method], partitioner(precision, method))
        gc.collect()  # graphs hang in cycles, and constants in graphs
    edge = EdgeProgramManager(lowered, _constants(checkpoint, context_length), COMPILE)
    # The default is one pass for all exports of a process, and it never lets go of their programs.
    planning = MemoryPlanningPass()
    program = edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True, memory_planning_pass=planning))
    with (folder / MODEL).open("wb") as file:
        program.write_to_file(file)
    for part in lowered.values():
        forget(part)
    return Written(Precision(**stored), {}, _notes(checkpoint, stored))


def unproven(precision: str) -> str | None:
    """Why an artifact of this precision cannot be opened here to be compared; None where it can."""
    if (name := backend(precision)) is None:
        return None
    return f"Lowered to {name} and never run: this machine's ExecuTorch has no {name} backend. No parity."


def _notes(checkpoint: Checkpoint, stored: dict[str, str]) -> list[str]:
    """What a user must know of the precisions in use."""
    if not _is_rounded(stored):
        return []
    rounded = [part for part in ("vision", "projector", "decoder", "head") if stored[part] not in {*FLOATS, "int8"}]
    ragged = [name for name, layer, component in _linears(checkpoint) if _is_ragged(layer, stored[component])]
    inputs = f"The linear layers of {', '.join(rounded)} round their inputs to 8 bits per token as they run"
    floats = ", but for the tower's queries, keys and first layer" if "vision" in rounded else ""
    return [
        *([f"{inputs}{floats}."] if rounded else []),
        *(["What is not rounded is float32, the key-value cache too."] if "fp16" not in stored.values() else []),
        *([f"8-bit weights, rows being no multiple of the group: {', '.join(ragged)}."] if ragged else []),
    ]


def dequantized(checkpoint: Checkpoint, precision: str, folder: Path) -> dict[str, torch.Tensor] | None:
    """Return the rounded weights of `folder`'s model.pte as float32 by their names in the checkpoint's model.

    Raises:
        CheckFailed: the file's linears are not the checkpoint's, in number, shape or values.
    """
    stored = resolve(precision, PRESETS, STORAGES)
    if not _is_rounded(stored):
        return None
    program, weights = read_program(folder / MODEL), {}
    if stored["embedding"] != "fp32":
        weights["model.language_model.embed_tokens.weight"] = byte_embedding(program)
    sources = {f"{name}.weight": layer.weight for name, layer, part in _linears(checkpoint) if stored[part] != "fp32"}
    for method in ("vision_encoder", "text_decoder"):
        for weight in linear_weights(program, method):
            name = _origin(weight, sources)
            if name is None:
                raise CheckFailed(f"{folder / MODEL}: {method} holds a linear that {checkpoint.folder} lacks.")
            weights[name] = weight
            del sources[name]
    if sources:
        raise CheckFailed(f"{folder / MODEL}: {len(sources)} linears are kept unquantized: {', '.join(sources)}.")
    return weights


def _is_rounded(stored: dict[str, str]) -> bool:
    """Whether any component is stored as integers; backends turn floats into their own type themselves."""
    return not set(stored.values()) <= FLOATS


def _linears(checkpoint: Checkpoint) -> list[tuple[str, nn.Linear, str]]:
    """The model's linear layers that are in the program: name, layer, component."""
    model = checkpoint.model
    vision, decoder = VisionEncoder(model), Decoder(model, 1)
    projector = {id(layer) for layer in vision.projector.modules()}
    parts = [(layer, "projector" if id(layer) in projector else "vision") for layer in vision.modules()] + [
        (layer, "head" if layer is decoder.head else "decoder") for layer in decoder.modules()
    ]
    names = {id(module): name for name, module in model.named_modules()}
    return [(names[id(layer)], layer, part) for layer, part in parts if isinstance(layer, nn.Linear)]


def _modules(
    checkpoint: Checkpoint, stored: dict[str, str], context_length: int, inputs: LayerInputs | None
) -> dict[str, Callable[[], nn.Module]]:
    """Each method -> what makes its module, a copy of the checkpoint's with the weights as `stored`."""
    model = checkpoint.model
    storages = {id(layer): _storage(name, stored[part]) for name, layer, part in _linears(checkpoint)}
    return {
        "vision_encoder": lambda: _rounded(checkpoint, VisionEncoder(model), storages, inputs),
        "token_embedding": lambda: (
            ByteEmbedding(model.get_input_embeddings().weight.detach().float())
            if stored["embedding"] == "int8"
            else in_float32(TokenEmbedding(model))
        ),
        "text_decoder": lambda: _rounded(checkpoint, CachedDecoder(model, context_length), storages, inputs),
    }


def _storage(name: str, storage: str) -> str:
    """How a linear layer of a component is stored."""
    return "int8" if storage == "8da8w" and SENSITIVE.search(name) else storage


def _rounded(
    checkpoint: Checkpoint, shared: nn.Module, storages: dict[int, str], inputs: LayerInputs | None
) -> nn.Module:
    """Copy a module that shares the checkpoint's parameters; each becomes float32 and is rounded before the next."""
    copied = copy.deepcopy(shared, {id(parameter): parameter for parameter in shared.parameters()}).eval()
    for original, (path, module) in zip(list(shared.modules()), list(copied.named_modules()), strict=True):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
        if isinstance(module, nn.Linear) and (storage := storages.get(id(original), "fp32")) not in FLOATS:
            if storage == "int8":
                copied.set_submodule(path, WeightOnlyLinear(byte_weight(module.weight, inputs=False), module.bias))
            elif _is_ragged(module, storage) or storage == "8da8w":
                module.weight = nn.Parameter(byte_weight(module.weight), requires_grad=False)
            else:
                factor = inputs.factor(original.get_parameter("weight")) if inputs else None
                weight = nibble_weight(module.weight, GROUPS[storage], factor)
                module.weight = nn.Parameter(weight, requires_grad=False)
            release_pages(checkpoint)
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            # XNNPACK has no fused attention: the eager form lowers to fewer and better supported operators.
            config._attn_implementation = "eager"
    release_pages(checkpoint)
    return copied


def _interfaces(checkpoint: Checkpoint, context_length: int) -> dict[str, tuple[tuple[torch.Tensor, ...], Any]]:
    """Each method's example inputs and which of their sizes stay open: a sequence may have 1 to S tokens."""
    size, hidden = checkpoint.facts.preprocessing.size, checkpoint.model.config.text_config.hidden_size
    n = Dim("n", min=1, max=context_length)
    example = 8  # any length above 1: torch.export would take 0 and 1 for constants
    return {
        "vision_encoder": ((torch.zeros(1, 3, size, size),), None),
        "token_embedding": ((torch.zeros(1, example, dtype=torch.long),), ({1: n},)),
        "text_decoder": ((torch.zeros(1, example, hidden), torch.arange(example)), ({1: n}, {0: n})),
    }


def _constants(checkpoint: Checkpoint, context_length: int) -> dict[str, object]:
    """What the stock runner asks a program for, by the names it looks for."""
    text = checkpoint.model.config.text_config
    return {
        "get_max_seq_len": context_length,
        "get_max_context_len": context_length,
        "get_vocab_size": text.vocab_size,
        "get_n_layers": text.num_hidden_layers,
        "get_bos_id": checkpoint.facts.bos_id,
        "get_eos_ids": [checkpoint.facts.eos_id],
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def _is_ragged(layer: nn.Linear, storage: str) -> bool:
    """Whether a linear's rows cannot be cut into groups of 4-bit weights; it gets 8 bits instead."""
    return storage in GROUPS and layer.in_features % GROUPS[storage] != 0


def _origin(weight: torch.Tensor, sources: dict[str, torch.Tensor]) -> str | None:
    """Return the name of the one of `sources` of which `weight` is a rounding, or None."""
    same_shape = [name for name, source in sources.items() if source.shape == weight.shape]
    closest = max(same_shape, key=lambda name: _cosine(sources[name][:PREFIX], weight[:PREFIX]), default=None)
    return closest if closest is not None and _cosine(sources[closest], weight) >= SAME_WEIGHT else None


@torch.no_grad()
def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.float().flatten(), b.flatten(), dim=0))
