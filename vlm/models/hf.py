"""LLaVA-1.5, which transformers has: only how its upstream checkpoints name and size things stands here."""

from typing import Any

from transformers import LlavaConfig

PROJECTOR = "mlp2x_gelu"  # upstream's name of LLaVA-1.5's projector: Linear, GELU, Linear
# Parts of upstream's `model.mm_projector` and what transformers calls them.
UPSTREAM = {"0": "linear_1", "2": "linear_2"}


def llava_config(vision: dict[str, Any], text: dict[str, Any], image_token_id: int) -> LlavaConfig:
    """Build a configuration from a vision tower's and a decoder's (transformers' keys); one token per patch."""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )
