"""The model as the exporters see it: three modules, plain tensors in and out, sharing the checkpoint's weights.

`VisionEncoder`, `TokenEmbedding` and `Decoder` compute what the checkpoint computes (tests/test_graph.py); a format
subclasses `Decoder` only to say where keys and values are kept.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration


class VisionEncoder(nn.Module):
    """Pixels [1, 3, S, S] -> (vision tokens [1, V, D], patch features [1, P, vision_dim]).

    Layers after the selected one are left out of the graph: MobileVLM reads hidden_states[-2].
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        tower = model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        layer = model.config.vision_feature_layer
        count = len(tower.encoder.layers)
        self.embeddings, self.pre_layrnorm = tower.embeddings, tower.pre_layrnorm
        self.layers = tower.encoder.layers[: layer if layer >= 0 else count + 1 + layer]
        self.projector = model.model.multi_modal_projector

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode one picture."""
        x = self.pre_layrnorm(self.embeddings(pixel_values))  # [1, 1 + P, vision_dim]
        for layer in self.layers:
            x = layer(x, attention_mask=None)
            x = x[0] if isinstance(x, tuple) else x
        features = x[:, 1:]  # [1, P, vision_dim]
        return self.projector(features), features


class TokenEmbedding(nn.Module):
    """Ids [1, N] -> embeddings [1, N, D]."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.table = model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look the ids up."""
        return self.table(input_ids)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of x [1, H, N, d] with cos, sin [1, 1, N, d]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Decoder(nn.Module):
    """LLaMA decoder on embeddings; subclasses implement `attend`, which stores keys and values.

    Args:
        model: the checkpoint.
        context_length: longest sequence, S.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, model: LlavaForConditionalGeneration, context_length: int) -> None:
        super().__init__()
        body, config = model.model.language_model, model.config.text_config
        self.layers, self.norm, self.head = body.layers, body.norm, model.lm_head
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.context_length = context_length
        with torch.no_grad():
            positions = torch.arange(context_length)[None]  # [1, S]
            cos, sin = body.rotary_emb(torch.zeros(1, 1, 1), positions)  # [1, S, d]
        self.register_buffer("cos", cos[0].float(), persistent=False)  # [S, d]
        self.register_buffer("sin", sin[0].float(), persistent=False)

    def run_layers(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: object) -> torch.Tensor:
        """Run all layers on x [1, N, D] and return the last position's logits [1, 1, vocabulary]."""
        for index, layer in enumerate(self.layers):
            attention = layer.self_attn
            h = layer.input_layernorm(x)  # [1, N, D]
            q = rotate(self._split(attention.q_proj(h), self.heads), cos, sin)  # [1, H, N, d]
            k = rotate(self._split(attention.k_proj(h), self.kv_heads), cos, sin)  # [1, KV, N, d]
            v = self._split(attention.v_proj(h), self.kv_heads)  # [1, KV, N, d]
            y = self.attend(index, q, k, v, cache)  # [1, H, N, d]
            x = x + attention.o_proj(y.transpose(1, 2).reshape(1, -1, self.heads * self.head_dim))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.head(self.norm(x[:, -1:]))  # [1, 1, vocabulary]

    def attend(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: object) -> torch.Tensor:
        """Store k, v [1, KV, N, d] of layer `index` and return the attention output [1, H, N, d]."""
        raise TypeError(f"{type(self).__name__} does not say where keys and values are kept")

    def _split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.view(1, -1, heads, self.head_dim).transpose(1, 2)  # [1, heads, N, d]


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of q [1, H, N, d] over k, v [1, KV, T, d] with mask [N, T]; KV heads are shared by H / KV heads."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
