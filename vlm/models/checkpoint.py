"""Checkpoints in Hugging Face layout: model, processor, prompt template, and what a runtime needs to know of them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import vlm.models.mobilevlm  # noqa: F401  (registers the architecture with transformers' Auto classes)
from vlm.errors import UserError
from vlm.folders import tree_sha256
from vlm.manifest import Preprocessing

SUPPORTED = ("mobilevlm", "llava")


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode with what is needed to ask it questions."""

    folder: Path
    model: LlavaForConditionalGeneration
    preprocessing: Preprocessing
    template: str
    image_tokens: int
    image_token_id: int
    bos_id: int
    eos_id: int

    @property
    def tokenizer_file(self) -> Path:
        """Path of tokenizer.json."""
        return self.folder / "tokenizer.json"

    @property
    def sha256(self) -> str:
        """One hash over every file of the checkpoint."""
        return tree_sha256(self.folder)


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Load a VLM from a folder in Hugging Face layout (safetensors only).

    Raises:
        UserError: no checkpoint there, an architecture that is not supported, or a damaged file.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(
            f"{folder}: no config.json, so this is no checkpoint. `make mobile` makes one in runs/tiny/student."
        )
    try:
        kind = json.loads(config_file.read_text()).get("model_type")
    except ValueError as error:
        raise UserError(f"{config_file}: not JSON ({error}). Copy the checkpoint again.") from error
    if kind not in SUPPORTED:
        raise UserError(f"{config_file}: model_type {kind!r} is not supported. Supported: {', '.join(SUPPORTED)}.")
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(
            f"{folder}: the weights cannot be read ({error}). Copy or train the checkpoint again."
        ) from error
    return describe(folder, model)


def describe(folder: Path, model: LlavaForConditionalGeneration) -> Checkpoint:
    """Collect what a runtime needs to know of `model`, whose processor lies in `folder`."""
    config = model.config
    processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    pad = processor.get("do_pad", False)
    mean, std = tuple(processor["image_mean"]), tuple(processor["image_std"])
    preprocessing = Preprocessing(
        size=config.vision_config.image_size,
        mean=mean,
        std=std,
        pad_colour=tuple(int(x * 255) for x in mean) if pad else (0, 0, 0),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Checkpoint(
        folder=folder,
        model=model,
        preprocessing=preprocessing,
        template="v1",
        image_tokens=config.image_seq_length,
        image_token_id=config.image_token_id,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
    )


def save_checkpoint(model: LlavaForConditionalGeneration, tokenizer_folder: Path, out: Path) -> None:
    """Write model, tokenizer and transformers processor to `out` (an existing folder)."""
    model.save_pretrained(out, safe_serialization=True)
    if (tokenizer_folder / "tokenizer.model").is_file():  # transformers writes tokenizer.json only
        shutil.copy2(tokenizer_folder / "tokenizer.model", out)
    config = model.config
    size = config.vision_config.image_size
    image_processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    # Vision tokens are counted in pooled patches: an effective patch as wide as image / sqrt(V), no CLS to subtract.
    effective_patch = size // round(config.image_seq_length**0.5)
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=AutoTokenizer.from_pretrained(tokenizer_folder),
        patch_size=effective_patch,
        vision_feature_select_strategy="full",
    ).save_pretrained(out)
