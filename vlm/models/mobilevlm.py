"""MobileVLM is transformers' LLaVA with another projector: LDP (V1, arXiv 2312.16886), LDPv2 (V2, arXiv 2402.03766)."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.activations import ACT2FN

from vlm.errors import UserError
from vlm.models.clip import CLIP_L_336
from vlm.registry import did_you_mean

POOL = 2  # both projectors halve the patch grid in each direction: 24 x 24 patches -> 144 tokens
VOCABULARY = (
    32064  # LLaMA's 32,000 pieces, <image>, <pad>, and rows up to a multiple of 64, as in LLaVA-1.5 for transformers
)
IMAGE_TOKEN_ID = 32000

_MOBILE_LLAMA = {"model_type": "llama", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
DECODERS: dict[str, dict[str, Any]] = {
    "1.7b": {
        **_MOBILE_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "3b": {
        **_MOBILE_LLAMA,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "7b": {
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}


class MobileVlmConfig(LlavaConfig):
    """LLaVA's configuration.

    Attributes:
        image_seq_length: number of vision tokens, after the projector's pooling.
        projector_type: "ldpnet" (V1) or "ldpnetv2" (V2), upstream's names.
        template: prompt template the model was trained with, a name of vlm.prompts.
        upstream: config.json of the upstream checkpoint this one was made from; None if there was none.
    """

    model_type = "mobilevlm"
    projector_type: str = "ldpnetv2"
    template: str = "v1"
    upstream: dict[str, Any] | None = None


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of an image, x [B, C, G, G]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each position's channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, C, G, G]


class InvertedResidual(nn.Module):
    """MobileNetV3's inverted residual block without expansion (arXiv 1905.02244 section 5), LayerNorm for BatchNorm.

    Depthwise 3x3 convolution, hard-swish, squeeze-and-excitation with hard-sigmoid, pointwise convolution; the input is
    added where the grid keeps its size.

    Args:
        width: channels, C.
        stride: of the depthwise convolution, 1 or 2.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        narrow = squeeze_width(width // 4)
        self.depthwise = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.norm_1 = ChannelNorm(width)
        self.squeeze = nn.Conv2d(width, narrow, 1)
        self.excite = nn.Conv2d(narrow, width, 1)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.norm_2 = ChannelNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, G, G] -> [B, C, G/stride, G/stride]."""
        y = F.hardswish(self.norm_1(self.depthwise(x)))  # [B, C, G/stride, G/stride]
        scale = y.mean((2, 3), keepdim=True)  # [B, C, 1, 1]
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(scale))))
        y = self.norm_2(self.pointwise(y))
        return y + x if self.stride == 1 else y


class LDP(nn.Module):
    """Lightweight downsample projector of V1: two linears, two inverted residual blocks, the second with stride 2.

    Args:
        vision_dim: width of the vision tower.
        hidden_size: width of the decoder, D.
        act: activation between the linears.
    """

    # Parts of upstream's `model.mm_projector` and what they are called here.
    UPSTREAM = {
        "model.mlp.1": "linear_1",
        "model.mlp.3": "linear_2",
        **{
            f"model.mb_block.{block + 1}.block.{theirs}": f"blocks.{block}.{ours}"
            for block in (0, 1)
            for theirs, ours in {
                "0.0": "depthwise",
                "0.1": "norm_1",
                "1.fc1": "squeeze",
                "1.fc2": "excite",
                "2.0": "pointwise",
                "2.1": "norm_2",
            }.items()
        },
    }

    def __init__(self, vision_dim: int, hidden_size: int, act: str = "gelu") -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_dim, hidden_size)
        self.act = ACT2FN[act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.blocks = nn.ModuleList([InvertedResidual(hidden_size, stride) for stride in (1, POOL)])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project patch features [B, G*G, vision_dim] to vision tokens [B, V, D] with V = ceil(G / 2) ** 2."""
        x = to_grid(self.linear_2(self.act(self.linear_1(features))))  # [B, D, G, G]
        for block in self.blocks:
            x = block(x)  # [B, D, G, G], then [B, D, G/2, G/2]
        return x.flatten(2).transpose(1, 2)  # [B, V, D]


class LDPv2(nn.Module):
    """Lightweight downsample projector: two linears, 2x2 average pooling, depthwise 3x3 convolution plus residual.

    Args:
        vision_dim: width of the vision tower.
        hidden_size: width of the decoder, D.
        act: activation between the linears.
    """

    UPSTREAM = {"mlp.mlp.0": "linear_1", "mlp.mlp.2": "linear_2", "peg.peg.0": "peg"}

    def __init__(self, vision_dim: int, hidden_size: int, act: str = "gelu") -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_dim, hidden_size)
        self.act = ACT2FN[act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.pool = nn.AvgPool2d(POOL)
        self.peg = nn.Conv2d(hidden_size, hidden_size, 3, padding=1, groups=hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project patch features [B, G*G, vision_dim] to vision tokens [B, V, D] with V = G*G / 4."""
        x = to_grid(self.linear_2(self.act(self.linear_1(features))))  # [B, D, G, G]
        x = self.pool(x)  # [B, D, G/2, G/2]
        x = self.peg(x) + x
        return x.flatten(2).transpose(1, 2)  # [B, V, D]


PROJECTORS: dict[str, type[LDP] | type[LDPv2]] = {"ldpnet": LDP, "ldpnetv2": LDPv2}


def to_grid(x: torch.Tensor) -> torch.Tensor:
    """Lay patches [B, G*G, D] out as an image [B, D, G, G]."""
    grid = int(x.shape[1] ** 0.5)
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], grid, grid)  # [B, D, G, G]


def squeeze_width(width: int) -> int:
    """The multiple of 8 nearest to `width` (at least 8) that loses no more than a tenth of it, as MobileNet rounds."""
    rounded = max(8, (width + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width else rounded + 8


class MobileVlmForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA whose `multi_modal_projector` is LDP or LDPv2.

    Raises:
        UserError: the configuration names another projector.
    """

    config_class = MobileVlmConfig

    def __init__(self, config: MobileVlmConfig) -> None:
        super().__init__(config)
        kind = config.projector_type
        if kind not in PROJECTORS:
            raise UserError(
                f"projector_type {kind!r} is not one of MobileVLM's: {', '.join(PROJECTORS)}."
                f"{did_you_mean(kind, PROJECTORS)} Correct the checkpoint's config.json."
            )
        self.model.multi_modal_projector = PROJECTORS[kind](
            config.vision_config.hidden_size, config.text_config.hidden_size, config.projector_hidden_act
        )
        self.post_init()


def mobilevlm_config(
    vision: dict[str, Any], text: dict[str, Any], image_token_id: int, projector_type: str = "ldpnetv2"
) -> MobileVlmConfig:
    """Build a configuration from a vision tower's and a decoder's (transformers' keys); the rest is MobileVLM's."""
    grid = vision["image_size"] // vision["patch_size"]
    side = grid // POOL if projector_type == "ldpnetv2" else -(-grid // POOL)
    return MobileVlmConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **vision},
        text_config={"model_type": "llama", "tie_word_embeddings": False, "rms_norm_eps": 1e-6, **text},
        image_token_index=image_token_id,
        image_seq_length=side**2,
        projector_type=projector_type,
    )


def published_config(size: str, projector_type: str = "ldpnetv2") -> MobileVlmConfig:
    """The configuration of MobileVLM at a published size ("1.7b", "3b", "7b"), for example to train it from the start.

    Raises:
        UserError: there is no such size.
    """
    if size not in DECODERS:
        raise UserError(f"MobileVLM has no size {size!r}.{did_you_mean(size, DECODERS)} Sizes: {', '.join(DECODERS)}.")
    text = {**DECODERS[size], "vocab_size": VOCABULARY, "pad_token_id": 0}
    return mobilevlm_config(CLIP_L_336, text, IMAGE_TOKEN_ID, projector_type)


AutoConfig.register(MobileVlmConfig.model_type, MobileVlmConfig, exist_ok=True)
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(MobileVlmConfig, MobileVlmForConditionalGeneration, exist_ok=True)
