"""The layout of upstream's own checkpoints (MobileVLM, LLaVA-1.5): one flat config.json with mm_* keys, other names.

Upstream's code: github.com/Meituan-AutoML/MobileVLM and github.com/haotian-liu/LLaVA.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlm.errors import UserError
from vlm.models import hf
from vlm.models.clip import KNOWN
from vlm.models.mobilevlm import PROJECTORS, MobileVlmForConditionalGeneration, mobilevlm_config
from vlm.registry import did_you_mean

_TOWER = "model.vision_tower.vision_tower."
TOWER = f"{_TOWER}vision_model."
PROJECTOR = "model.mm_projector."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # their rows are the vocabulary
# Older transformers saved these buffers; they are computed, not trained.
_BUFFERS = (".rotary_emb.inv_freq", ".embeddings.position_ids")
_GRID = 24  # LDPv2 upstream pools any grid to 12 x 12; that is the 2 x 2 pooling of the papers for this one only
# Keys of LLaMA's configuration that stand at the top of upstream's config.json.
_DECODER_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_OPTIONAL_KEYS = ("num_key_value_heads", "rope_theta", "rope_scaling", "attention_bias", "attention_dropout")
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mm_vision_select_layer",
)


@dataclass(frozen=True)
class Family:
    """What belongs to one of upstream's projector types.

    Attributes:
        model: transformers' class.
        projector: parts of upstream's `model.mm_projector` -> parts of `model.multi_modal_projector`.
        config: (vision config, decoder config, image token id) -> configuration of `model`.
        upstream: what upstream's config.json says of the class.
    """

    model: type[LlavaForConditionalGeneration]
    projector: dict[str, str]
    config: Callable[[dict[str, Any], dict[str, Any], int], LlavaConfig]
    upstream: dict[str, Any]


def _mobilevlm(kind: str) -> Family:
    names = {"architectures": ["MobileLlamaForCausalLM"], "model_type": "mobilevlm"}
    return Family(
        MobileVlmForConditionalGeneration,
        PROJECTORS[kind].UPSTREAM,
        lambda vision, text, image: mobilevlm_config(vision, text, image, kind),
        {**names, "mm_projector_type": kind},
    )


_LLAVA = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "mm_projector_type": hf.PROJECTOR}
FAMILIES = {
    **{kind: _mobilevlm(kind) for kind in PROJECTORS},
    hf.PROJECTOR: Family(LlavaForConditionalGeneration, hf.UPSTREAM, hf.llava_config, _LLAVA),
}


def check(config: dict[str, Any], file: Path) -> Family:
    """Return the family of an upstream configuration.

    Raises:
        UserError: it asks for something that is not supported; names key, value and what is.
    """
    if missing := [key for key in _NEEDED if key not in config]:
        raise UserError(f"{file}: {', '.join(missing)} missing. Take config.json of the published checkpoint.")
    for key in _NEEDED:
        if type(config[key]) is not int:
            raise UserError(f"{file}: {key} {config[key]!r} found, a whole number expected. Correct it.")
    kind = config.get("mm_projector_type", "linear")  # upstream's default
    if kind not in FAMILIES:
        raise UserError(
            f"{file}: mm_projector_type {kind!r} is not supported, expected one of {', '.join(FAMILIES)}."
            f"{did_you_mean(kind, FAMILIES)}"
        )
    allowed: dict[str, tuple[Any, ...]] = {
        "mm_vision_select_feature": (None, "patch"),
        "mm_use_im_start_end": (None, False),
        "image_aspect_ratio": (None, "pad", "square"),
        "tie_word_embeddings": (None, False),
        "vision_tower_type": (None, "clip"),
    }
    for key, values in allowed.items():
        if config.get(key) not in values:
            raise UserError(
                f"{file}: {key} {config[key]!r} is not supported, expected {values[-1]!r}. MobileVLM V1, V2 and "
                "LLaVA-1.5 as published have that."
            )
    return FAMILIES[kind]


def vision_sizes(name: str) -> dict[str, Any] | None:
    """CLIP's configuration for a tower's hub name, or for a folder that has that name; None if it is not known."""
    base = name.rstrip("/").rpartition("/")[2]
    return next((sizes for known, sizes in KNOWN.items() if known.endswith(f"/{base}")), None)


def build_config(
    upstream: dict[str, Any], vision: dict[str, Any], vocabulary: int, image_token_id: int, file: Path
) -> LlavaConfig:
    """Build the configuration of transformers' model from upstream's.

    Args:
        upstream: config.json.
        vision: the tower's configuration, transformers' keys.
        vocabulary: rows of the embeddings, <image> included.
        image_token_id: id of <image>.
        file: where `upstream` came from, for messages.
    Raises:
        UserError: it asks for something that is not supported.
    """
    family = check(upstream, file)
    grid = vision["image_size"] // vision["patch_size"]
    if upstream["mm_projector_type"] == "ldpnetv2" and grid != _GRID:
        raise UserError(
            f"{file}: ldpnetv2 with a grid of {grid} x {grid} patches found, {_GRID} x {_GRID} expected: upstream "
            "pools every grid to 12 x 12, here patches are pooled 2 x 2. Use a tower of 336 pixels and patches of 14."
        )
    layer, layers = upstream["mm_vision_select_layer"], vision["num_hidden_layers"]
    if not -layers - 1 <= layer <= layers:
        raise UserError(f"{file}: mm_vision_select_layer {layer} found, the tower has {layers} layers. Correct it.")
    text = {key: upstream[key] for key in _DECODER_KEYS + _OPTIONAL_KEYS if upstream.get(key) is not None}
    text |= {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": vocabulary}
    config = family.config({"model_type": "clip_vision_model", **vision}, text, image_token_id)
    config.vision_feature_layer = layer
    config.upstream, config.template = upstream, "v1"
    config.dtype = upstream.get("torch_dtype") or "float32"
    return config


def upstream_config(config: LlavaConfig, tower: str, vocabulary: int, padded: bool) -> dict[str, Any]:
    """Build upstream's config.json from ours; keys that the checkpoint was imported with are kept.

    Args:
        config: of a MobileVLM or LLaVA-1.5.
        tower: hub name of the CLIP.
        vocabulary: rows of the embeddings, <image> not included.
        padded: whether pictures are padded to a square (else cropped).
    """
    text, imported = config.text_config.to_dict(), getattr(config, "upstream", None) or {}
    rope = text.get("rope_parameters") or {}
    sizes = {key: text.get(key) for key in _DECODER_KEYS} | {"rope_theta": rope.get("rope_theta", 10000.0)}
    made = {
        **family_of(config).upstream,
        **sizes,
        "num_key_value_heads": text["num_key_value_heads"],
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else {
            "type": rope["rope_type"], "factor": rope.get("factor")
        },
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_mm_proj": True,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch" if config.vision_feature_select_strategy == "default" else "cls_patch",
        "vision_tower_type": "clip",
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
    }  # fmt: skip
    actual = {
        "vocab_size": vocabulary,
        "mm_vision_tower": tower,
        "mm_vision_select_layer": config.vision_feature_layer,
        "torch_dtype": str(config.dtype or "float32").removeprefix("torch."),
    }
    if padded or imported.get("image_aspect_ratio") == "pad":
        actual["image_aspect_ratio"] = "pad" if padded else "square"
    return {**made, **imported, **sizes, **actual}


def expected_shapes(config: LlavaConfig, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Upstream's names and the shapes of all tensors of a model, with embeddings of `vocabulary` rows."""
    family = family_of(config)
    with torch.device("meta"):
        state = family.model(config).state_dict()
    found = {to_upstream_name(name, family.projector): tuple(tensor.shape) for name, tensor in state.items()}
    return found | {name: (vocabulary, found[name][1]) for name in (EMBEDDING, HEAD)}


def family_of(config: LlavaConfig) -> Family:
    """The family of one of our configurations."""
    return FAMILIES[getattr(config, "projector_type", hf.PROJECTOR)]


def to_upstream_name(name: str, projector: dict[str, str]) -> str:
    """The name upstream gives a tensor of transformers' state_dict (or of a file that transformers wrote).

    Names that upstream does not have come back unchanged.
    """
    name = canonical(name)
    if name.startswith("model.multi_modal_projector."):
        part, _, leaf = name.removeprefix("model.multi_modal_projector.").rpartition(".")
        theirs = {ours: theirs for theirs, ours in projector.items()}.get(part)
        return f"{PROJECTOR}{theirs}.{leaf}" if theirs else name
    if name.startswith("model.vision_tower."):
        return TOWER + name.removeprefix("model.vision_tower.")
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def to_our_name(name: str, projector: dict[str, str]) -> str:
    """The name of an upstream tensor in transformers' state_dict; what upstream does not have comes back unchanged."""
    if name.startswith(PROJECTOR):
        part, _, leaf = name.removeprefix(PROJECTOR).rpartition(".")
        return f"model.multi_modal_projector.{projector[part]}.{leaf}" if part in projector else name
    if name.startswith(TOWER):
        return "model.vision_tower." + name.removeprefix(TOWER)
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return name


def canonical(name: str) -> str:
    """The state_dict name of a tensor in any of the ways in which transformers' versions wrote LLaVA's files."""
    bare = name.removeprefix("model.")
    if bare.startswith("language_model.lm_head."):
        return bare.removeprefix("language_model.")
    for part in ("language_model", "vision_tower", "multi_modal_projector"):
        if bare.startswith(f"{part}."):
            rest = bare.removeprefix(f"{part}.")
            return f"model.{part}." + rest.removeprefix("model." if part == "language_model" else "vision_model.")
    return name


def published_name(name: str) -> str:
    """The name that published checkpoints give an upstream tensor; saved with transformers 5, a tower's is shorter."""
    if name.startswith(_TOWER) and not name.startswith(TOWER):
        return TOWER + name.removeprefix(_TOWER)
    return name


def is_buffer(name: str) -> bool:
    """Whether a tensor of a file is one of transformers' computed buffers."""
    return name.endswith(_BUFFERS)
