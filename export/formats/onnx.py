"""ONNX: three graphs in the field's names.

    vision_encoder.onnx         pixel_values -> image_features, patch_features
    embed_tokens.onnx           input_ids -> inputs_embeds
    decoder_model_merged.onnx   inputs_embeds, ..., past_key_values.N.key|value -> logits, present.N.key|value

Matrices are float32, float16, or block-quantized (MatMulNBits, GatherBlockQuantized). A float32 decoder is traced and
has standard operators only; any other is written operator by operator with ONNX Runtime's own (export._onnx_decoder).
The weight matrices carry the checkpoint's parameter names, so `dequantized` can read them back.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from export._onnx_blocks import ROUNDINGS
from export._onnx_decoder import GroupQueryDecoder
from export._onnx_graph import save
from export._onnx_weights import DYNAMIC, name_matrices, read_stored, store
from export.calibration import LayerInputs
from export.formats.base import Cost, Written
from export.graph import Decoder, TokenEmbedding, VisionEncoder, masked_attention
from export.precision import COMPONENTS, resolve, uniform
from export.source import in_float32
from vlm.manifest import Precision
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes.onnx import DECODER, EMBEDDING, VISION, cache_names

ENGINE = "onnx"
COST = Cost(memory=3.5, seconds=40e-9, vision=1.1)
# The vision tower is small and its errors reach every token, so no preset takes it below 8 bits.
PRESETS = {
    "fp32": uniform("fp32"),
    "fp16": uniform("fp16"),
    "int8": uniform("int8"),
    **{name: uniform(name, vision="int8", projector="int8") for name in ROUNDINGS if name.startswith("int4")},
}
PRECISIONS = tuple(PRESETS)
STORAGES = dict.fromkeys(COMPONENTS, ("fp32", "fp16", *ROUNDINGS)) | dict.fromkeys(
    ("vision", "projector"), ("fp32", "fp16", *ROUNDINGS, DYNAMIC)
)

# Measured with ONNX Runtime 1.31 on x86: opset 23's Attention and RMSNormalization make decoding a quarter faster and
# the vision tower half as fast.
OPSET = {VISION: 21, EMBEDDING: 21, DECODER: 23}
# accuracy_level of MatMulNBits in the vision tower: it computes in float32.
VISION_ACTIVATIONS = 0


class OnnxDecoder(Decoder):
    """Decoder whose keys and values come in as tensors and go out longer."""

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Append embeddings [1, N, D] at positions [1, N] to past keys and values [1, KV, P, d], two per layer."""
        cos, sin = self.cos[position_ids][:, None], self.sin[position_ids][:, None]  # [1, 1, N, d]
        new, old = inputs_embeds.shape[1], past[0].shape[2]
        mask = torch.arange(old + new)[None] <= torch.arange(new)[:, None] + old  # [N, P + N]
        present: list[torch.Tensor] = []
        logits = self.run_layers(inputs_embeds, cos, sin, (past, present, mask))  # [1, 1, vocabulary]
        return logits, present

    def attend(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Any) -> torch.Tensor:
        """Concatenate past and new keys and values of layer `index`."""
        past, present, mask = cache
        k = torch.cat((past[2 * index], k), 2)  # [1, KV, P + N, d]
        v = torch.cat((past[2 * index + 1], v), 2)  # [1, KV, P + N, d]
        present += [k, v]
        return masked_attention(q, k, v, mask)


def write(
    checkpoint: Checkpoint, precision: str, folder: Path, context_length: int, inputs: LayerInputs | None = None
) -> Written:
    """Write the three graphs into `folder`.

    Args:
        checkpoint: the model, in any type; only one matrix of a rounded decoder is in memory at a time.
        precision: one of PRESETS, with exceptions; see export.precision.
        context_length: longest sequence in tokens.
        inputs: what the decoder's matrices are multiplied with; see export.formats.base.
    """
    stored = resolve(precision, PRESETS, STORAGES)
    model, size = checkpoint.model, checkpoint.facts.preprocessing.size
    _write_traced(model, VISION, VisionEncoder(model), partial(_vision, size=size), stored, folder)
    _write_traced(model, EMBEDDING, TokenEmbedding(model), partial(_embedding, longest=context_length), stored, folder)
    decoder = OnnxDecoder(model, context_length)
    if stored["decoder"] == stored["head"] == "fp32":
        _write_traced(model, DECODER, decoder, _decoder, stored, folder)
    else:
        GroupQueryDecoder(checkpoint, folder / DECODER, context_length, stored, inputs).write()
    return Written(
        precisions=Precision(**stored),
        settings={"layers": len(decoder.layers), "kv_heads": decoder.kv_heads, "head_dim": decoder.head_dim},
        notes=_notes(stored),
    )


def dequantized(checkpoint: Checkpoint, precision: str, folder: Path) -> dict[str, torch.Tensor] | None:
    """Read the matrices that are not float32 back from the files; None where all are."""
    if set(resolve(precision, PRESETS, STORAGES).values()) == {"fp32"}:
        return None
    return {
        name: torch.from_numpy(matrix)
        for file in (VISION, EMBEDDING, DECODER)
        for name, matrix in read_stored(onnx.load(folder / file)).items()
    }


def _notes(stored: dict[str, str]) -> list[str]:
    """What a user must know of the precisions in use."""
    used = [name for name in ROUNDINGS if name in stored.values()]
    notes = [
        f"{name}: weight matrices are {rounding.bits}-bit integers with a float scale"
        f"{'' if rounding.symmetric else ' and a zero point'} per {rounding.block} weights."
        for name, rounding in ROUNDINGS.items()
        if name in used
    ]
    if stored["decoder"] in ROUNDINGS or stored["head"] in ROUNDINGS:
        notes.append("The decoder's linear layers round their inputs to 8 bits per block as they run.")
    if DYNAMIC in stored.values():
        notes.append(
            f"{DYNAMIC}: 8-bit weights with a scale per output; inputs are rounded to 8 bits per layer and call."
        )
    if notes or "fp16" in stored.values():
        notes.append("Convolutions, biases, norms, position embeddings and the key-value cache stay float32.")
    if "fp16" in stored.values():
        notes.append("float16 weights are widened at loading; the CPU computes in float32.")
    return notes


def _write_traced(
    model: nn.Module,
    file: str,
    module: nn.Module,
    trace: Callable[[Any], onnx.ModelProto],
    stored: dict[str, str],
    folder: Path,
) -> None:
    """Trace a module that shares the checkpoint's weights, and store its matrices as `stored` says."""
    names = {id(part): name for name, part in model.named_modules()}
    plain = in_float32(module)
    pairs = zip(module.modules(), plain.modules(), strict=True)
    modules = {names[id(shared)]: copied for shared, copied in pairs if id(shared) in names}
    graph = trace(plain)
    name_matrices(graph, modules)
    kinds = {component: stored[component] for component in _components(file)}
    if set(kinds.values()) != {"fp32"}:
        store(graph, lambda name: kinds[_component(name, file)], VISION_ACTIVATIONS)
    save(graph, folder / file)
    # onnxscript's rules remember the graphs they looked at, for good: those may keep no weights.
    for parameter in plain.parameters():
        parameter.data = torch.empty(0)


def _components(file: str) -> tuple[str, ...]:
    return {VISION: ("vision", "projector"), EMBEDDING: ("embedding",), DECODER: ("decoder", "head")}[file]


def _component(name: str, file: str) -> str:
    """Which component a parameter of a file belongs to."""
    part = {VISION: "multi_modal_projector", DECODER: "lm_head"}.get(file)
    return _components(file)[-1 if part is None or part in name else 0]


def _vision(module: nn.Module, size: int) -> onnx.ModelProto:
    example = (torch.zeros(1, 3, size, size),)
    return _export(VISION, module, example, ["pixel_values"], ["image_features", "patch_features"])


def _embedding(module: nn.Module, longest: int) -> onnx.ModelProto:
    sequence = torch.export.Dim("sequence", min=1, max=longest)
    ids = torch.zeros(1, 3, dtype=torch.long)
    return _export(EMBEDDING, module, (ids,), ["input_ids"], ["inputs_embeds"], ({1: sequence},))


def _decoder(decoder: Any) -> onnx.ModelProto:
    names, present = cache_names(len(decoder.layers))
    sequence = torch.export.Dim("sequence", min=1, max=decoder.context_length)
    past = torch.export.Dim("past", min=1, max=decoder.context_length)
    width = decoder.head.in_features
    cache = [torch.zeros(1, decoder.kv_heads, 4, decoder.head_dim) for _ in names]  # [1, KV, P, d]
    return _export(
        DECODER,
        decoder,
        (torch.zeros(1, 3, width), torch.arange(4, 7)[None], cache),
        ["inputs_embeds", "position_ids", *names],
        ["logits", *present],
        ({1: sequence}, {1: sequence}, [{2: past} for _ in names]),
    )


def _export(
    file: str,
    module: nn.Module,
    example: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic: tuple[Any, ...] | None = None,
) -> onnx.ModelProto:
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter warns that two inputs share a dimension's name, which is what we ask for.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic,
            opset_version=OPSET[file],
            verbose=False,
        )
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    for constant in program.model.graph.initializers.values():
        constant.const_value = None  # see _write_traced
    return graph
