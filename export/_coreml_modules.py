"""The decoder as Core ML wants it: keys and values in states written by slice, and a norm that float16 can hold."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from export.graph import Decoder

_SMALLEST = 1e-2  # below this the scale of a row needs no care in float16


class HalfRMSNorm(nn.Module):
    """RMSNorm whose squares cannot overflow in float16: x / m is normalised, with m the row's largest magnitude.

    x / sqrt(mean(x^2) + e) = y / sqrt(mean(y^2) + e / m^2) with y = x / m, so |y| <= 1. LLaMA's residual stream passes
    256, where a float16 square is infinite.
    """

    weight: nn.Parameter

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, float(norm.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of x [1, N, D]."""
        largest = torch.clamp(x.abs().amax(-1, keepdim=True), min=_SMALLEST)  # [1, N, 1]
        y = x / largest  # [1, N, D]
        epsilon = self.epsilon**0.5 / largest  # [1, N, 1]
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + epsilon.pow(2)) * self.weight


class CoreMlDecoder(Decoder):
    """Decoder with keys and values in two states [L, 1, KV, S, d]; the mask's width says how much of them is used.

    The positions are written by slice assignment: an indexed write converts without complaint to a program that never
    writes its state.
    """

    key_cache: torch.Tensor
    value_cache: torch.Tensor

    def __init__(self, model: LlavaForConditionalGeneration, context_length: int) -> None:
        super().__init__(model, context_length)
        norms = ("input_layernorm", "post_attention_layernorm")
        self.layers = nn.ModuleList(_with_half_norms(layer, norms) for layer in self.layers)
        self.norm = HalfRMSNorm(self.norm)
        shape = (len(self.layers), 1, self.kv_heads, context_length, self.head_dim)
        self.register_buffer("key_cache", torch.zeros(shape))
        self.register_buffer("value_cache", torch.zeros(shape))

    def forward(self, inputs_embeds: torch.Tensor, causal_mask: torch.Tensor) -> torch.Tensor:
        """Append embeddings [1, N, D]; causal_mask [1, 1, N, E] is 0 or very negative, E counts those so far."""
        end = causal_mask.shape[-1]
        begin = end - inputs_embeds.shape[1]
        cos, sin = (self.get_buffer(name)[begin:end][None, None] for name in ("cos", "sin"))  # [1, 1, N, d]
        return self.run_layers(inputs_embeds, cos, sin, (begin, end, causal_mask))

    def attend(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Any) -> torch.Tensor:
        """Write the new keys and values into the states and attend to all so far."""
        begin, end, mask = cache
        self.key_cache[index : index + 1, :, :, begin:end] = k[None]
        self.value_cache[index : index + 1, :, :, begin:end] = v[None]
        keys, values = self.key_cache[index, :, :, :end], self.value_cache[index, :, :, :end]  # [1, KV, E, d]
        # Core ML's attention has no grouped form: the heads of a group become more rows of q.
        groups = self.heads // self.kv_heads
        if groups == 1:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        grouped = q.reshape(1, self.kv_heads, -1, self.head_dim)  # [1, KV, G * N, d]
        y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask.repeat(1, 1, groups, 1))
        return y.reshape(1, self.heads, -1, self.head_dim)  # [1, H, N, d]


def _with_half_norms(layer: Any, names: tuple[str, ...]) -> nn.Module:
    """Return a layer that shares everything with `layer` except its norms, so that the checkpoint stays as it is."""
    twin = copy.copy(layer)
    twin._modules = layer._modules | {name: HalfRMSNorm(getattr(layer, name)) for name in names}
    return twin
