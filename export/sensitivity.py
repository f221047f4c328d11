"""Which layers suffer from few bits: one is rounded at a time, and the divergence of the answers is measured.

The divergence is KL(float || rounded) in nats, mean over the tokens of right answers to questions about training
scenes. A proposal gives 8 bits to the components that gain most per bit, until the mean width reaches a budget;
divergences of layers are added up for it, which is what small independent errors do.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.blocks import Rounding, quantize_blocks
from export.calibration import Prompt, calibration_prompts, prompt_embeddings
from export.graph import VisionEncoder
from export.source import with_weights
from vlm.models.checkpoint import Checkpoint

SCHEMA = 1
NARROW, WIDE = Rounding(4, 32), Rounding(8, 32)
# Bits of a weight with its share of a float16 scale and of the zero point.
BITS = {"narrow": 4 + 20 / 32, "wide": 8 + 24 / 32}
# Storage of narrow and wide by format, and the components that have both; others keep the preset's.
STORAGES = {"onnx": ("int4", "int8"), "coreml": ("int4", "int8"), "executorch": ("8da4w", "8da8w")}
CHOOSABLE = {"onnx": ("vision", "projector", "embedding", "decoder", "head"),
             "coreml": ("vision", "projector", "embedding", "decoder", "head"),
             "executorch": ("decoder", "head")}  # fmt: skip
Say = Callable[[int, int], None]


@dataclass(frozen=True)
class Layer:
    """Matrices that are rounded together: name, component, the parameters' names, how many numbers they hold."""

    name: str
    component: str
    parameters: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Found:
    """A layer's divergence in nats per token with 4 and with 8 bits."""

    layer: Layer
    narrow: float
    wide: float


def scan(checkpoint: Checkpoint, scenes: int, say: Say) -> list[Found]:
    """Round each layer alone, to 4 and to 8 bits in blocks of 32 with a zero point, to the nearest.

    Args:
        checkpoint: the model.
        scenes: questions to measure on; their pictures are training scenes.
        say: told how many layers are done, of how many.
    """
    checkpoint = with_weights(checkpoint, {})
    prompts, found = list(calibration_prompts(checkpoint, scenes)), []
    layers, embedded = parts(checkpoint), _embed(checkpoint, prompts)
    truth = _answers(checkpoint, prompts, embedded)
    for number, layer in enumerate(layers):
        # What the decoder reads is the same as long as only its own weights are rounded.
        seen = embedded if layer.component in ("decoder", "head") else None
        narrow, wide = (_divergence(checkpoint, layer, rounding, prompts, truth, seen) for rounding in (NARROW, WIDE))
        found.append(Found(layer, narrow, wide))
        say(number + 1, len(layers))
    return found


def passes(checkpoint: Checkpoint, scenes: int) -> int:
    """How many prompts `scan` sends through the model: each layer's, rounded to either width, and the truth's."""
    return scenes * (1 + 2 * len(parts(checkpoint)))


def parts(checkpoint: Checkpoint) -> list[Layer]:
    """The layers in the order of the computation; of the vision tower those that are read."""
    model, matrices = checkpoint.model, dict[int, str]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or module is model.get_input_embeddings():
            matrices[id(module)] = f"{name}.weight"
    encoder, body = VisionEncoder(model), model.model.language_model
    groups: list[tuple[str, str, Any]] = [
        *((f"vision {index}", "vision", layer) for index, layer in enumerate(encoder.layers)),
        ("projector", "projector", encoder.projector),
        ("embedding", "embedding", body.embed_tokens),
    ]
    for index, layer in enumerate(body.layers):
        groups += [(f"decoder {index} {kind}", "decoder", getattr(layer, attribute))
                   for kind, attribute in (("attention", "self_attn"), ("mlp", "mlp"))]  # fmt: skip
    found = []
    for name, component, module in [*groups, ("head", "head", model.lm_head)]:
        names = tuple(matrices[id(part)] for part in module.modules() if id(part) in matrices)
        found.append(Layer(name, component, names, sum(model.get_parameter(name).numel() for name in names)))
    return found


def propose(found: Sequence[Found], bits: float) -> dict[str, str]:
    """Choose "narrow" or "wide" for each component.

    Args:
        found: what `scan` returned.
        bits: mean bits per weight, scales included, that must not be passed.
    """
    components = dict.fromkeys(entry.layer.component for entry in found)
    counts = {name: sum(e.layer.count for e in found if e.layer.component == name) for name in components}
    gains = {name: sum(e.narrow - e.wide for e in found if e.layer.component == name) for name in components}
    total, chosen = sum(counts.values()), dict.fromkeys(components, "narrow")
    for name in sorted(components, key=lambda name: gains[name] / counts[name], reverse=True):
        tried = chosen | {name: "wide"}
        if sum(BITS[kind] * counts[part] for part, kind in tried.items()) <= bits * total:
            chosen = tried
    return chosen


def targets(chosen: dict[str, str]) -> list[str]:
    """A proposal as targets of `pocketvlm export`."""
    result = []
    for name, storages in STORAGES.items():
        stored = {part: storages[chosen[part] == "wide"] for part in CHOOSABLE[name]}
        base = stored.pop("decoder")
        # A preset stores embedding and head as the decoder, and what sees the picture with more bits.
        implied = dict.fromkeys(("embedding", "head"), base)
        result.append(f"{name}:{base}" + "".join(f",{k}={v}" for k, v in stored.items() if implied.get(k) != v))
    return result


def tree(found: Sequence[Found], scenes: int, bits: float) -> dict[str, Any]:
    """What sensitivity.json holds."""
    chosen = propose(found, bits)
    weights = sum(entry.layer.count for entry in found)
    return {
        "schema": SCHEMA,
        "scenes": scenes,
        "budget_bits": bits,
        "mean_bits": sum(BITS[chosen[entry.layer.component]] * entry.layer.count for entry in found) / weights,
        "layers": [{**asdict(entry.layer), "kl_4": entry.narrow, "kl_8": entry.wide} for entry in found],
        "proposal": {name: 8 if kind == "wide" else 4 for name, kind in chosen.items()},
        "targets": targets(chosen),
    }


def _divergence(
    checkpoint: Checkpoint,
    layer: Layer,
    rounding: Rounding,
    prompts: list[Prompt],
    truth: list[Tensor],
    embedded: list[Tensor] | None,
) -> float:
    weights = {name: _rounded(checkpoint.model.get_parameter(name), rounding) for name in layer.parameters}
    rounded = with_weights(checkpoint, weights)
    found = _answers(rounded, prompts, _embed(rounded, prompts) if embedded is None else embedded)
    kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(truth, found, strict=True)]  # [A] each
    return float(torch.cat(kl).mean())


def _rounded(parameter: Tensor, rounding: Rounding) -> Tensor:
    matrix = parameter.detach().float().numpy()
    return torch.from_numpy(quantize_blocks(matrix, rounding).dequantize(matrix.shape[1]))


@torch.inference_mode()
def _embed(checkpoint: Checkpoint, prompts: list[Prompt]) -> list[Tensor]:
    """What the decoder reads of each prompt, [1, N, D]."""
    encoder = VisionEncoder(checkpoint.model)
    return [prompt_embeddings(checkpoint, encoder, prompt) for prompt in prompts]


@torch.inference_mode()
def _answers(checkpoint: Checkpoint, prompts: list[Prompt], embedded: list[Tensor]) -> list[Tensor]:
    """Log-probabilities of each answer's tokens and its end, [A + 1, vocabulary] each."""
    model, found = checkpoint.model, []
    for prompt, x in zip(prompts, embedded, strict=True):
        states = model.model.language_model(inputs_embeds=x).last_hidden_state[0, -prompt.answer - 1 :]
        found.append(model.lm_head(states).log_softmax(-1))
    return found
