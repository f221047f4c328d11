"""Tiny random models for tests: every structure of the real thing, none of its size."""

from pathlib import Path
from typing import Any

import torch

from vlm.manifest import Preprocessing
from vlm.models.checkpoint import save_checkpoint
from vlm.models.mobilevlm import MobileVlmForConditionalGeneration, mobilevlm_config

VISION = {
    "image_size": 96,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def random_model(vocab_size: int, image_token_id: int, seed: int = 0, **text: Any) -> MobileVlmForConditionalGeneration:
    """Build a random model whose weights are large enough that a wrong graph shows."""
    torch.manual_seed(seed)
    config = mobilevlm_config(VISION, {**TEXT, "vocab_size": vocab_size, **text}, image_token_id)
    model = MobileVlmForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
    return model


def save_random_checkpoint(out: Path, seed: int = 0, **text: int) -> Path:
    """Save a random model with the built-in tokenizer in Hugging Face layout; returns its folder."""
    from transformers import AutoTokenizer

    from vlm.data.scenes.train_tokenizer import train_tokenizer

    tokenizer_folder = train_tokenizer(out.parent / f"{out.name}-tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    out.mkdir(parents=True, exist_ok=True)
    model = random_model(len(tokenizer), image_token_id, seed, **text)
    save_checkpoint(model, tokenizer_folder, Preprocessing(size=VISION["image_size"]), out)
    return out
