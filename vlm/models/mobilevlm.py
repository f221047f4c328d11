"""MobileVLM V2 as transformers' LLaVA with another projector (LDPv2, arXiv 2402.03766 section 3.3)."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.activations import ACT2FN

POOL = 2  # LDPv2 halves the patch grid in each direction: 24 x 24 patches -> 144 tokens


class MobileVlmConfig(LlavaConfig):
    """LLaVA's configuration; `image_seq_length` is the number of tokens after pooling."""

    model_type = "mobilevlm"
    projector_type: str = "ldpnetv2"


class LDPv2(nn.Module):
    """Lightweight downsample projector: two linears, 2x2 average pooling, depthwise 3x3 convolution plus residual.

    Args:
        vision_dim: width of the vision tower.
        hidden_size: width of the decoder, D.
        act: activation between the linears.
    """

    def __init__(self, vision_dim: int, hidden_size: int, act: str = "gelu") -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_dim, hidden_size)
        self.act = ACT2FN[act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.pool = nn.AvgPool2d(POOL)
        self.peg = nn.Conv2d(hidden_size, hidden_size, 3, padding=1, groups=hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project patch features [B, G*G, vision_dim] to vision tokens [B, V, D] with V = G*G / 4."""
        x = self.linear_2(self.act(self.linear_1(features)))  # [B, G*G, D]
        grid = int(x.shape[1] ** 0.5)
        x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], grid, grid)  # [B, D, G, G]
        x = self.pool(x)  # [B, D, G/2, G/2]
        x = self.peg(x) + x
        return x.flatten(2).transpose(1, 2)  # [B, V, D]


class MobileVlmForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA whose `multi_modal_projector` is LDPv2."""

    config_class = MobileVlmConfig

    def __init__(self, config: MobileVlmConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = LDPv2(
            config.vision_config.hidden_size, config.text_config.hidden_size, config.projector_hidden_act
        )
        self.post_init()


def tiny_config(vision: dict[str, Any], text: dict[str, Any], image_token_id: int) -> MobileVlmConfig:
    """Build a configuration from the sizes of a vision tower and a decoder; everything else is MobileVLM V2's."""
    grid = vision["image_size"] // vision["patch_size"]
    return MobileVlmConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **vision},
        text_config={"model_type": "llama", "tie_word_embeddings": False, "rms_norm_eps": 1e-6, **text},
        image_token_index=image_token_id,
        image_seq_length=(grid // POOL) ** 2,
    )


AutoConfig.register(MobileVlmConfig.model_type, MobileVlmConfig, exist_ok=True)
AutoModelForImageTextToText.register(MobileVlmConfig, MobileVlmForConditionalGeneration, exist_ok=True)
