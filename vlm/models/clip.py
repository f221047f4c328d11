"""The vision towers that published checkpoints name: CLIP's sizes, so that its weights need no hub."""

from typing import Any

CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}
KNOWN = {
    "openai/clip-vit-large-patch14-336": CLIP_L_336,
    "openai/clip-vit-large-patch14": {**CLIP_L_336, "image_size": 224},
}
