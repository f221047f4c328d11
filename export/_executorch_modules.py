"""The modules ExecuTorch gets: a decoder with its key-value cache in buffers, 8-bit embeddings and linear layers."""

import executorch.extension.llm.custom_ops.custom_ops  # registers torch.ops.llama.*
import executorch.kernels.quantized  # noqa: F401  (registers torch.ops.quantized_decomposed.embedding_byte.out)
import torch
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  (... .embedding_byte.dtype)
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from export.graph import Decoder

INT8_MAX = 127


class CachedDecoder(Decoder):
    """Embeddings [1, N, D] at positions [N] -> the last position's logits; keys and values live in mutable buffers.

    ExecuTorch's llama operators write and read the buffers in place. An index_copy would copy the whole cache at every
    step.
    """

    def __init__(self, model: LlavaForConditionalGeneration, context_length: int) -> None:
        super().__init__(model, context_length)
        for index in range(len(self.layers)):
            for name in ("key", "value"):
                cache = torch.zeros(1, context_length, self.kv_heads, self.head_dim)  # [1, S, KV, d]
                self.register_buffer(f"{name}_cache_{index}", cache, persistent=False)

    def forward(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Append embeds [1, N, D] at the consecutive `positions` [N] int64 and return logits [1, 1, vocabulary]."""
        start = positions[0].item()
        torch._check_is_size(start)
        torch._check(start < self.context_length)
        cos, sin = self.cos[positions][None, None], self.sin[positions][None, None]  # [1, 1, N, d]
        return self.run_layers(embeds, cos, sin, start)

    def attend(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: object) -> torch.Tensor:
        """Write k, v into the buffers at the start position and attend causally to everything before."""
        keys, values = getattr(self, f"key_cache_{index}"), getattr(self, f"value_cache_{index}")  # [1, S, KV, d]
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # [1, N, heads, d]
        torch.ops.llama.update_cache(k, keys, cache)
        torch.ops.llama.update_cache(v, values, cache)
        y = torch.ops.llama.custom_sdpa(q, keys, values, cache, None, 0.0, True)  # [1, N, H, d]
        return y.transpose(1, 2)  # [1, H, N, d]


class ByteEmbedding(nn.Module):
    """Ids [1, N] -> embeddings [1, N, D] from int8 rows with one float scale each (symmetric)."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        scales = table.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / INT8_MAX  # [vocabulary]
        rows = (table / scales[:, None]).round().to(torch.int8)  # [vocabulary, D]
        self.register_buffer("rows", rows)
        self.register_buffer("scales", scales)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look the ids up and dequantize their rows."""
        lookup = torch.ops.quantized_decomposed.embedding_byte.dtype
        return lookup(self.rows, self.scales, None, -INT8_MAX - 1, INT8_MAX, input_ids, dtype=torch.float32)


class WeightOnlyLinear(nn.Module):
    """A linear layer with a rounded weight [out, in] and inputs in float32; its bias [out] is added apart.

    XNNPACK's exporter wants to scale a bias by its input's scale, which there is none of.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in] -> [..., out]."""
        y = F.linear(x, self.weight)  # [..., out]
        return y if self.bias is None else y + self.bias
