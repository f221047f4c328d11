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
from vlm.manifest import Facts, Preprocessing

SUPPORTED = ("mobilevlm", "llava")


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode with what is needed to ask it questions."""

    folder: Path
    model: LlavaForConditionalGeneration
    facts: Facts

    @property
    def preprocessing(self) -> Preprocessing:
        """How the model wants its pictures."""
        return self.facts.preprocessing

    @property
    def image_tokens(self) -> int:
        """Number of vision tokens, V."""
        return self.facts.image_tokens

    @property
    def sha256(self) -> str:
        """One hash over every file of the checkpoint."""
        return tree_sha256(self.folder)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a VLM in float32 from a folder in Hugging Face layout (safetensors only).

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
        raise UserError(
            f"{config_file}: model_type {kind!r} is not supported, expected one of {', '.join(SUPPORTED)}. Convert the "
            "checkpoint to one of these layouts, or describe the architecture in vlm/models/ and add it to SUPPORTED."
        )
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(
            f"{folder}: the weights cannot be read ({error}). Copy or train the checkpoint again."
        ) from error
    # transformers fills what is missing with random numbers and only logs it.
    wrong = {kind: sorted(map(str, loading[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if found := "; ".join(f"{kind}: {', '.join(keys[:5])}" for kind, keys in wrong.items() if keys):
        raise UserError(f"{folder}: the weights do not fit config.json ({found}). Copy or train the checkpoint again.")
    return describe(folder, model.eval())


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
    facts = Facts(
        preprocessing=preprocessing,
        template="v1",
        image_tokens=config.image_seq_length,
        image_token_id=config.image_token_id,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        context_length=config.text_config.max_position_embeddings,
        tokenizer=folder / "tokenizer.json",
    )
    return Checkpoint(folder, model, facts)


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
