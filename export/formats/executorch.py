"""ExecuTorch: one model.pte with the methods vision_encoder, token_embedding and text_decoder, for XNNPACK.

The stock MultimodalRunner (executorch.extension.llm.runner) finds the methods and constants it looks for; it reads the
first output of vision_encoder and passes over the second, the patch features, which parity needs.
"""

import copy
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export import export as trace
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

from export._executorch_modules import ByteEmbedding, CachedDecoder
from export._executorch_weights import byte_embedding, linear_weights, read_program
from export.formats.base import Written
from export.graph import Decoder, TokenEmbedding, VisionEncoder
from vlm.errors import CheckFailed
from vlm.manifest import Precision
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes.executorch import MODEL

ENGINE = "executorch"
PRECISIONS = ("fp32", "8da4w")
GROUP = 32  # columns of a 4-bit weight that share a scale
SAME_WEIGHT = 0.9  # least cosine of a weight read back with the one it came from; another of its shape has about 0
PREFIX = 8  # rows that are enough to tell weights apart

ROUNDED = (
    "The decoder's linears round their inputs to 8 bits per token as they run; vision tower, projector, norms and the "
    "key-value cache stay float32."
)

# XNNPACK keeps the scales of 4-bit groups in bfloat16: rounding them here first lets the integers make up for it.
INT4 = Int8DynamicActivationIntxWeightConfig(
    weight_dtype=torch.int4,  # type: ignore[attr-defined]  # torch makes its narrow types at run time
    weight_granularity=PerGroup(GROUP),
    weight_scale_dtype=torch.bfloat16,
    intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
)
INT8 = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))


def write(checkpoint: Checkpoint, precision: str, folder: Path, context_length: int) -> Written:
    """Write model.pte into `folder`.

    Args:
        checkpoint: a float32 model; it is not changed.
        precision: "fp32", or "8da4w": 4-bit weights in groups of 32 in the decoder's linears, 8-bit embedding,
            8-bit activations scaled per token; the vision tower and projector stay float32.
        folder: an existing folder.
        context_length: longest sequence, S, in tokens.
    """
    programs = _trace(checkpoint, *_modules(checkpoint, precision, context_length), context_length)
    edge = to_edge_transform_and_lower(
        programs,
        partitioner={method: [XnnpackPartitioner()] for method in programs},
        constant_methods=_constants(checkpoint, context_length),
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    program = edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True))
    with (folder / MODEL).open("wb") as file:
        program.write_to_file(file)
    if precision == "fp32":
        return Written(Precision(vision="fp32", projector="fp32", embedding="fp32", decoder="fp32"), {})
    ragged = [name for name, layer in Decoder(checkpoint.model, 1).named_modules() if _is_ragged(layer)]
    notes = [f"8-bit weights, rows being no multiple of {GROUP}: {', '.join(ragged)}."] if ragged else []
    precisions = Precision(vision="fp32", projector="fp32", embedding="int8", decoder="8da4w")
    return Written(precisions, {}, [ROUNDED, *notes])


def dequantized(checkpoint: Checkpoint, precision: str, folder: Path) -> dict[str, torch.Tensor] | None:
    """Return the quantized weights of `folder`'s model.pte as float32 by their names in the checkpoint's model.

    Raises:
        CheckFailed: the file's linears are not the checkpoint's, in number, shape or values.
    """
    if precision == "fp32":
        return None
    program, model = read_program(folder / MODEL), checkpoint.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    table = model.get_input_embeddings().weight
    weights = {names[id(table)]: byte_embedding(program)}
    sources = [layer.weight for layer in Decoder(model, 1).modules() if isinstance(layer, nn.Linear)]
    for weight in linear_weights(program, "text_decoder"):
        source = _origin(weight, sources)
        if source is None:
            raise CheckFailed(f"{folder / MODEL}: text_decoder holds a linear that {checkpoint.folder} lacks.")
        weights[names[id(source)]] = weight
        sources = [other for other in sources if other is not source]
    if sources:
        raise CheckFailed(f"{folder / MODEL}: text_decoder keeps {len(sources)} linears unquantized.")
    return weights


def _modules(checkpoint: Checkpoint, precision: str, context_length: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Vision tower with projector, embedding and decoder of a copy of the model, with the weights of `precision`."""
    model = copy.deepcopy(checkpoint.model)
    # XNNPACK has no fused attention: the eager form lowers to fewer and better supported operators.
    model.set_attn_implementation("eager")
    vision, decoder = VisionEncoder(model).eval(), CachedDecoder(model, context_length).eval()
    if precision == "fp32":
        return vision, TokenEmbedding(model), decoder
    quantize_(decoder, INT4, lambda module, _: isinstance(module, nn.Linear) and not _is_ragged(module))
    quantize_(decoder, INT8, lambda module, _: isinstance(module, nn.Linear) and _is_ragged(module))
    return vision, ByteEmbedding(model.get_input_embeddings().weight.detach()), decoder


def _trace(
    checkpoint: Checkpoint, vision: nn.Module, embedding: nn.Module, decoder: nn.Module, context_length: int
) -> dict[str, ExportedProgram]:
    """Trace the three methods; a sequence may have 1 to S tokens."""
    size, hidden = checkpoint.facts.preprocessing.size, checkpoint.model.config.text_config.hidden_size
    n = Dim("n", min=1, max=context_length)
    example = 8  # any length above 1: torch.export would take 0 and 1 for constants
    pixels = torch.zeros(1, 3, size, size)
    ids, positions = torch.zeros(1, example, dtype=torch.long), torch.arange(example)
    embeds = torch.zeros(1, example, hidden)
    with torch.no_grad():
        return {
            "vision_encoder": trace(vision, (pixels,), strict=False),
            "token_embedding": trace(embedding, (ids,), dynamic_shapes=({1: n},), strict=False),
            "text_decoder": trace(decoder, (embeds, positions), dynamic_shapes=({1: n}, {0: n}), strict=False),
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


def _is_ragged(module: nn.Module) -> bool:
    """Whether this is a linear whose rows cannot be cut into groups of GROUP columns; it gets 8 bits instead of 4."""
    return isinstance(module, nn.Linear) and module.in_features % GROUP != 0


def _origin(weight: torch.Tensor, sources: list[torch.Tensor]) -> torch.Tensor | None:
    """Return the one of `sources` of which `weight` is a rounding, or None."""
    same_shape = [source for source in sources if source.shape == weight.shape]
    closest = max(same_shape, key=lambda source: _cosine(source[:PREFIX], weight[:PREFIX]), default=None)
    return closest if closest is not None and _cosine(closest, weight) >= SAME_WEIGHT else None


@torch.no_grad()
def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
