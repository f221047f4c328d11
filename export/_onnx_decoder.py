"""The decoder for ONNX Runtime, written operator by operator, one matrix in memory at a time.

    inputs_embeds, attention_mask, past_key_values.N.key|value -> logits, present.N.key|value

GroupQueryAttention turns, stores and attends in one operator. Where past and present are the same buffer of
`context_length` positions, it appends to it in place (onnxruntime/docs/ContribOperators.md); otherwise it returns a
longer one, as the field's other decoders do.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export._onnx_blocks import ROUNDINGS, pack
from export._onnx_graph import DOMAIN, GraphFile
from export.blocks import quantize_blocks
from export.calibration import LayerInputs
from export.graph import Decoder
from export.source import release_pages
from vlm.errors import UserError
from vlm.models.checkpoint import Checkpoint
from vlm.runtimes.onnx import cache_names

# accuracy_level of MatMulNBits. 4 rounds the activations to 8 bits per block: without it a token takes several times
# as long.
ACTIVATIONS = 4
HEAD_MULTIPLE = 16  # of GroupQueryAttention's head size when it turns keys and queries itself


class GroupQueryDecoder:
    """Writes one decoder.

    Args:
        checkpoint: the model, in any type.
        path: the .onnx file.
        context_length: longest sequence, S.
        stored: how matrices are stored: "decoder" and "head".
        inputs: what the matrices are multiplied with; those of 4 bits are rounded for it.
    Raises:
        UserError: the engine has no operator for the decoder's activation or size of heads.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        path: Path,
        context_length: int,
        stored: dict[str, str],
        inputs: LayerInputs | None,
    ) -> None:
        self.checkpoint, model = checkpoint, checkpoint.model
        self.decoder, self.config = Decoder(model, context_length), model.config.text_config
        self.graph, self.stored, self.inputs = GraphFile(path), stored, inputs
        self.names = {id(module): name for name, module in model.named_modules()}
        if self.config.hidden_act != "silu" or self.decoder.head_dim % HEAD_MULTIPLE:
            raise UserError(
                f"decoder with activation {self.config.hidden_act} and heads of {self.decoder.head_dim}: this ONNX "
                f"precision takes silu and multiples of {HEAD_MULTIPLE}. Use onnx:fp32."
            )

    def write(self) -> None:
        """Write the file."""
        decoder, graph = self.decoder, self.graph
        self._lengths()
        for name, table in (("cos", decoder.cos), ("sin", decoder.sin)):
            graph.constant(name, table[:, : decoder.head_dim // 2].numpy())  # [S, d / 2]: its two halves are equal
        residual = "inputs_embeds"  # [1, N, D]
        first = decoder.layers[0].input_layernorm
        x = graph.node(
            "SimplifiedLayerNormalization",
            [residual, self._constant(first)],
            ["normed"],
            axis=-1,
            epsilon=first.variance_epsilon,
            stash_type=1,
        )  # [1, N, D]
        for index, layer in enumerate(decoder.layers):
            is_last = index + 1 == len(decoder.layers)
            following = decoder.norm if is_last else decoder.layers[index + 1].input_layernorm
            x, residual = self._layer(index, layer, x, residual, following, is_last)
            release_pages(self.checkpoint)
        self._linear(decoder.head, x, "head", "logits")  # [1, 1, vocabulary]
        self._close()

    def _layer(self, index: int, layer: Any, x: str, residual: str, following: Any, is_last: bool) -> tuple[str, str]:
        """Add a layer to the normed x and the residual stream [1, N, D]; returns both for the next one."""
        graph, attention = self.graph, layer.self_attn
        q, k, v = (self._linear(attention.get_submodule(f"{part}_proj"), x) for part in "qkv")  # [1, N, heads * d]
        y = self._attend(index, q, k, v)  # [1, N, H * d]
        if is_last:  # only the last position's logits are wanted
            end = graph.constant("end", np.array([-1]))
            y = graph.node("Gather", [y, end], ["last.attended"], axis=1)  # [1, 1, H * d]
            residual = graph.node("Gather", [residual, end], ["last.residual"], axis=1)  # [1, 1, D]
        x, residual = self._add_and_norm(residual, self._linear(attention.o_proj, y), layer.post_attention_layernorm)
        gate, up = self._linear(layer.mlp.gate_proj, x), self._linear(layer.mlp.up_proj, x)  # [1, N, F]
        gate = graph.node("QuickGelu", [gate], [f"{gate}.silu"], DOMAIN, alpha=1.0)  # x * sigmoid(x)
        product = graph.node("Mul", [gate, up], [f"{up}.gated"])
        return self._add_and_norm(residual, self._linear(layer.mlp.down_proj, product), following)

    def _attend(self, index: int, q: str, k: str, v: str) -> str:
        past, present = (names[2 * index : 2 * index + 2] for names in cache_names(index + 1))
        return self.graph.node(
            "GroupQueryAttention",
            [q, k, v, *past, "last_index", "length", "cos", "sin"],
            [f"attended.{index}", *present],
            DOMAIN,
            num_heads=self.decoder.heads,
            kv_num_heads=self.decoder.kv_heads,
            do_rotary=1,
            scale=float(self.decoder.head_dim**-0.5),
        )

    def _add_and_norm(self, residual: str, x: str, norm: Any) -> tuple[str, str]:
        """Names of RMSNorm(residual + x) and of the sum."""
        outputs = [f"{x}.normed", "", "", f"{x}.sum"]
        inputs = [residual, x, self._constant(norm)]
        self.graph.node("SkipSimplifiedLayerNormalization", inputs, outputs, DOMAIN, epsilon=norm.variance_epsilon)
        return outputs[0], outputs[3]

    def _linear(self, layer: Any, x: str, component: str = "decoder", output: str = "") -> str:
        """Multiply x [1, N, in] by the layer's weight as it is stored; returns the name of [1, N, out]."""
        name, graph = f"{self.names[id(layer)]}.weight", self.graph
        bias = layer.bias
        product = f"{name}.product" if output == "" or bias is not None else output
        matrix, storage = layer.weight.detach(), self.stored[component]
        if storage in ROUNDINGS:
            rounding = ROUNDINGS[storage]
            factor = self.inputs.factor(layer.weight) if self.inputs and rounding.bits == 4 else None
            blocks = quantize_blocks(matrix.float().numpy(), rounding, factor)
            parts = pack(blocks, rounding, matrix.shape[1], True)
            graph.node(
                "MatMulNBits",
                [x, *(graph.constant(f"{name}.{part}", array) for part, array in parts.items())],
                [product],
                DOMAIN,
                K=matrix.shape[1],
                N=matrix.shape[0],
                bits=rounding.bits,
                block_size=rounding.block,
                accuracy_level=ACTIVATIONS,
            )
        else:
            kind = np.float16 if storage == "fp16" else np.float32
            weight = graph.constant(name, matrix.float().numpy().astype(kind))  # [out, in]
            weight = graph.node("Cast", [weight], [f"{name}.float"], to=1) if storage == "fp16" else weight
            weight = graph.node("Transpose", [weight], [f"{name}.transposed"], perm=[1, 0])  # once, at loading
            graph.node("MatMul", [x, weight], [product])
        if bias is None:
            return product
        return graph.node("Add", [product, self._constant(layer, "bias")], [output or f"{name}.biased"])

    def _lengths(self) -> None:
        """Say how long the sequence is, and the index of its last token, from the mask [1, P + N]."""
        graph = self.graph
        one = graph.constant("one", np.array([1]))
        graph.node("ReduceSum", ["attention_mask", one], ["count"], keepdims=0)  # [1]
        graph.node("Sub", ["count", one], ["last"])
        graph.node("Cast", ["last"], ["last_index"], to=6)  # [1] int32
        graph.node("Shape", ["attention_mask"], ["mask_shape"])
        graph.node("Gather", ["mask_shape", graph.constant("columns", np.array(1))], ["columns_count"], axis=0)
        graph.node("Cast", ["columns_count"], ["length"], to=6)  # int32

    def _close(self) -> None:
        decoder, floats = self.decoder, np.float32
        past, present = cache_names(len(decoder.layers))
        sizes = 1, decoder.kv_heads, decoder.head_dim
        width, vocabulary = decoder.head.in_features, decoder.head.out_features
        self.graph.close(
            {
                "inputs_embeds": (floats, [1, "sequence", width]),
                "attention_mask": (np.int64, [1, "total"]),
                **{name: (floats, [*sizes[:2], "past", sizes[2]]) for name in past},
            },
            {
                "logits": (floats, [1, 1, vocabulary]),
                **{name: (floats, [*sizes[:2], "present", sizes[2]]) for name in present},
            },
        )

    def _constant(self, module: nn.Module, parameter: str = "weight") -> str:
        """A vector of the module's, as float32 whatever the precision."""
        values: torch.Tensor = module.get_parameter(parameter)
        return self.graph.constant(f"{self.names[id(module)]}.{parameter}", values.detach().float().numpy())
