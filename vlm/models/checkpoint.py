"""Checkpoints in Hugging Face layout: model, processor, prompt template, and what a runtime needs to know of them."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaForConditionalGeneration

import vlm.models.mobilevlm  # noqa: F401  (registers the architecture with transformers' Auto classes)
from vlm.errors import UserError
from vlm.folders import tree_sha256
from vlm.manifest import Facts, Preprocessing
from vlm.models.hub import read_config
from vlm.models.prepared import prepared
from vlm.models.processor import read_preprocessing, save_processor
from vlm.models.tokenizers import MODEL
from vlm.prompts import TEMPLATES
from vlm.registry import did_you_mean

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

    @cached_property
    def sha256(self) -> str:
        """One hash over every file of the checkpoint."""
        return tree_sha256(self.folder)


def load_checkpoint(
    name: Path, dtype: torch.dtype | Literal["auto"] = torch.float32, quantization: Any = None
) -> Checkpoint:
    """Load a VLM.

    Args:
        name: a folder in Hugging Face layout (safetensors only), one in upstream's layout, which is converted once
            (vlm.models.prepared), or a hub name of either.
        dtype: of the weights; "auto" leaves them as they are stored, memory-mapped: they take no memory until read.
        quantization: transformers' configuration of quantized weights, which are then put onto the GPU.
    Raises:
        UserError: no checkpoint there, an architecture that is not supported, or a damaged file.
    """
    folder = prepared(name)
    kind = read_config(folder).get("model_type")
    if kind not in SUPPORTED:
        raise UserError(
            f"{folder / 'config.json'}: model_type {kind!r} is not supported, expected one of {', '.join(SUPPORTED)}. "
            "Convert the checkpoint to one of these layouts, or describe the architecture in vlm/models/ and add it to "
            "SUPPORTED."
        )
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(
            f"{folder}: the weights cannot be read ({error}). Copy or train the checkpoint again."
        ) from error
    # transformers fills what is missing with random numbers and only logs it.
    wrong = {kind: sorted(map(str, loading[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if found := "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in wrong.items() if keys):
        raise UserError(f"{folder}: the weights do not fit config.json ({found}). Copy or train the checkpoint again.")
    return describe(folder, model.eval())


def describe(folder: Path, model: LlavaForConditionalGeneration) -> Checkpoint:
    """Collect what a runtime needs to know of `model`, whose processor lies in `folder`.

    Raises:
        UserError: the processor is missing or prepares pictures in a way that is not supported, or the template that
            config.json names does not exist.
    """
    config = model.config
    # A checkpoint that names no template is one of LLaVA's: those are trained with Vicuna's.
    template = getattr(config, "template", "v1")
    if template not in TEMPLATES:
        raise UserError(
            f"{folder / 'config.json'}: template {template!r} found, expected one of {', '.join(TEMPLATES)}."
            f"{did_you_mean(template, TEMPLATES)}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    facts = Facts(
        preprocessing=read_preprocessing(folder, config.vision_config.image_size),
        template=template,
        image_tokens=config.image_seq_length,
        image_token_id=config.image_token_id,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        context_length=config.text_config.max_position_embeddings,
        tokenizer=folder / "tokenizer.json",
    )
    return Checkpoint(folder, model, facts)


def save_checkpoint(
    model: LlavaForConditionalGeneration, tokenizer_folder: Path, preprocessing: Preprocessing, out: Path
) -> None:
    """Write model, tokenizer and transformers processor to `out` (an existing folder).

    Args:
        model: what was trained.
        tokenizer_folder: where its tokenizer lies.
        preprocessing: how its pictures were prepared.
        out: gets the files.
    """
    model.save_pretrained(out, safe_serialization=True)
    if (tokenizer_folder / MODEL).is_file():  # transformers writes tokenizer.json only
        shutil.copy2(tokenizer_folder / MODEL, out)
    save_processor(model.config, AutoTokenizer.from_pretrained(tokenizer_folder), preprocessing, out)
