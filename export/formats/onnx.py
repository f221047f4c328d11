"""ONNX: three graphs in the field's names, float32 or with block-quantized weights (MatMulNBits, GatherBlockQuantized).

    vision_encoder.onnx         pixel_values -> image_features, patch_features
    embed_tokens.onnx           input_ids -> inputs_embeds
    decoder_model_merged.onnx   inputs_embeds, position_ids, past_key_values.N.key|value -> logits, present.N.key|value

The weight matrices carry the checkpoint's parameter names, so `dequantized` can read them back.
"""

import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from export._onnx_weights import BLOCK, name_matrices, quantize, read_quantized
from export.formats.base import Written
from export.graph import Decoder, TokenEmbedding, VisionEncoder, masked_attention
from vlm.manifest import Precision
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes.onnx import DECODER, EMBEDDING, VISION, cache_names

ENGINE = "onnx"
PRECISIONS = ("fp32", "int8", "int4")

# Measured with ONNX Runtime 1.31 on x86: opset 23's Attention and RMSNormalization make decoding a quarter faster and
# the vision tower half as fast.
OPSET = {VISION: 21, EMBEDDING: 21, DECODER: 23}
INLINE_LIMIT = 3 << 29  # bytes of weights inside one .onnx file, below protobuf's 2 GiB; more goes to <file>.data
# Bits of the weights per file. The vision tower is small and its errors reach every token, so it never goes below 8.
BITS = {
    "fp32": {},
    "int8": {VISION: 8, EMBEDDING: 8, DECODER: 8},
    "int4": {VISION: 8, EMBEDDING: 4, DECODER: 4},
}
# MatMulNBits' accuracy_level. 0 computes in float32. 4 rounds the activations to 8 bits: without it one token against
# 8-bit weights takes ten times as long.
ACTIVATIONS = {("int8", DECODER): 4}
ROUNDED = (
    f"Weight matrices are integers with a float scale and a zero point per {BLOCK} weights; convolutions, biases, "
    "norms and position embeddings stay float32."
)


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


def write(checkpoint: Checkpoint, precision: str, folder: Path, context_length: int) -> Written:
    """Write the three graphs into `folder`.

    Args:
        checkpoint: the model, float32.
        precision: one of PRECISIONS.
        context_length: longest sequence in tokens.
    """
    bits = BITS[precision]
    decoder = OnnxDecoder(checkpoint.model, context_length)
    for file, graph in (
        (VISION, _vision(checkpoint)),
        (EMBEDDING, _embedding(checkpoint, context_length)),
        (DECODER, _decoder(decoder)),
    ):
        name_matrices(graph, checkpoint.model)
        if file in bits:
            quantize(graph, bits[file], ACTIVATIONS.get((precision, file), 0))
        _save(graph, folder / file)
    vision, embedding, text = (f"int{bits[file]}" if bits else "fp32" for file in (VISION, EMBEDDING, DECODER))
    return Written(
        precisions=Precision(vision=vision, projector=vision, embedding=embedding, decoder=text),
        settings={"layers": len(decoder.layers), "kv_heads": decoder.kv_heads, "head_dim": decoder.head_dim},
        notes=[ROUNDED] if bits else [],
    )


def dequantized(checkpoint: Checkpoint, precision: str, folder: Path) -> dict[str, torch.Tensor] | None:
    """Read the quantized matrices back from the files as float32; None for fp32."""
    if not BITS[precision]:
        return None
    files = (VISION, EMBEDDING, DECODER)
    return {
        name: torch.from_numpy(matrix)
        for file in files
        for name, matrix in read_quantized(onnx.load(folder / file)).items()
    }


def _vision(checkpoint: Checkpoint) -> onnx.ModelProto:
    size = checkpoint.facts.preprocessing.size
    return _export(
        VISION,
        VisionEncoder(checkpoint.model),
        (torch.zeros(1, 3, size, size),),
        ["pixel_values"],
        ["image_features", "patch_features"],
    )


def _embedding(checkpoint: Checkpoint, context_length: int) -> onnx.ModelProto:
    sequence = torch.export.Dim("sequence", min=1, max=context_length)
    ids = torch.zeros(1, 3, dtype=torch.long)
    return _export(
        EMBEDDING, TokenEmbedding(checkpoint.model), (ids,), ["input_ids"], ["inputs_embeds"], ({1: sequence},)
    )


def _decoder(decoder: OnnxDecoder) -> onnx.ModelProto:
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
    return program.model_proto


def _save(model: onnx.ModelProto, path: Path) -> None:
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    large = weights > INLINE_LIMIT
    onnx.save(model, path, save_as_external_data=large, location=f"{path.name}.data" if large else None)
