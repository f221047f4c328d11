"""Tiny random checkpoints in upstream's layout, every name and shape written out by hand."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VISION, WIDTH, INNER, LAYERS, GRID, PATCH = 32, 64, 160, 2, 24, 4
TOWER = "model.vision_tower.vision_tower.vision_model."
CLIP = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "text_config": {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8},
    "vision_config": {
        "hidden_size": VISION,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": GRID * PATCH,
        "patch_size": PATCH,
        "hidden_act": "quick_gelu",
    },
}
PROJECTORS: dict[str, dict[str, tuple[int, ...]]] = {
    "mlp2x_gelu": {"0.weight": (WIDTH, VISION), "0.bias": (WIDTH,), "2.weight": (WIDTH, WIDTH), "2.bias": (WIDTH,)},
    "ldpnetv2": {
        "mlp.mlp.0.weight": (WIDTH, VISION),
        "mlp.mlp.0.bias": (WIDTH,),
        "mlp.mlp.2.weight": (WIDTH, WIDTH),
        "mlp.mlp.2.bias": (WIDTH,),
        "peg.peg.0.weight": (WIDTH, 1, 3, 3),
        "peg.peg.0.bias": (WIDTH,),
    },
    "ldpnet": {
        "model.mlp.1.weight": (WIDTH, VISION),
        "model.mlp.1.bias": (WIDTH,),
        "model.mlp.3.weight": (WIDTH, WIDTH),
        "model.mlp.3.bias": (WIDTH,),
        **{
            f"model.mb_block.{block}.block.{name}": shape
            for block in (1, 2)
            for name, shape in {
                "0.0.weight": (WIDTH, 1, 3, 3),
                "0.1.weight": (WIDTH,),
                "0.1.bias": (WIDTH,),
                "1.fc1.weight": (16, WIDTH, 1, 1),
                "1.fc1.bias": (16,),
                "1.fc2.weight": (WIDTH, 16, 1, 1),
                "1.fc2.bias": (WIDTH,),
                "2.0.weight": (WIDTH, WIDTH, 1, 1),
                "2.1.weight": (WIDTH,),
                "2.1.bias": (WIDTH,),
            }.items()
        },
    },
}


def tower_shapes() -> dict[str, tuple[int, ...]]:
    """The vision tower's tensors, as in CLIP's own files without "vision_model."."""
    found: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (VISION,),
        "embeddings.patch_embedding.weight": (VISION, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": (GRID**2 + 1, VISION),
    }
    wide = {"mlp.fc1": (64, VISION), "mlp.fc2": (VISION, 64)}
    square = {f"self_attn.{part}_proj": (VISION, VISION) for part in ("q", "k", "v", "out")}
    for layer in range(3):
        for name, shape in (square | wide).items():
            found[f"encoder.layers.{layer}.{name}.weight"] = shape
            found[f"encoder.layers.{layer}.{name}.bias"] = shape[:1]
    norms = [f"encoder.layers.{layer}.layer_norm{part}" for layer in range(3) for part in (1, 2)]
    for name in (*norms, "pre_layrnorm", "post_layernorm"):
        found |= {f"{name}.weight": (VISION,), f"{name}.bias": (VISION,)}
    return found


def shapes(kind: str, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a whole checkpoint with the projector `kind`."""
    table = (vocabulary, WIDTH)
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": table,
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        found |= {f"{at}self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        found |= {f"{at}mlp.{part}_proj.weight": (INNER, WIDTH) for part in ("gate", "up")}
        found |= {f"{at}mlp.down_proj.weight": (WIDTH, INNER)}
        found |= {f"{at}{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
    found |= {f"model.mm_projector.{name}": shape for name, shape in PROJECTORS[kind].items()}
    return found | {f"{TOWER}{name}": shape for name, shape in tower_shapes().items()}


def random_tensors(
    shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Random values for every name; vectors lie around 1, as the weights of norms do."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1)).to(dtype)
        for name, shape in shapes.items()
    }


def save_clip(folder: Path, seed: int = 5) -> dict[str, Tensor]:
    """Save a whole CLIP, text side and all; returns the tower's tensors by upstream's names."""
    folder.mkdir(parents=True)
    tower = random_tensors({f"vision_model.{name}": shape for name, shape in tower_shapes().items()}, seed)
    rest = random_tensors({"text_model.embeddings.token_embedding.weight": (9, 8), "visual_projection.weight": (8, 32)})
    rest |= {"logit_scale": torch.ones(()), "vision_model.embeddings.position_ids": torch.arange(GRID**2 + 1)[None]}
    save_file({**tower, **rest}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CLIP))
    return {TOWER + name.removeprefix("vision_model."): tensor for name, tensor in tower.items()}


def save_upstream(
    folder: Path, kind: str, clip: Path, state: dict[str, Tensor] | None = None, shards: int = 1, **changes: Any
) -> dict[str, Tensor]:
    """Save a checkpoint as upstream publishes them: PyTorch files, flat config.json, sentencepiece's tokenizer.

    Args:
        folder: to be made.
        kind: projector type.
        clip: what config.json gives as the vision tower.
        state: tensors, instead of random ones.
        shards: number of PyTorch files.
        changes: keys of config.json.
    Returns:
        The tensors by name.
    """
    from vlm.data.scenes.train_tokenizer import VOCABULARY, train_tokenizer

    folder.mkdir(parents=True)
    state = state or random_tensors(shapes(kind, VOCABULARY))
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    everything = {**state, **buffers}
    if shards == 1:
        torch.save(everything, folder / "pytorch_model.bin")
    else:
        names = [f"pytorch_model-{number + 1:05}-of-{shards:05}.bin" for number in range(shards)]
        places = {name: names[index % shards] for index, name in enumerate(everything)}
        for file in names:
            torch.save({name: everything[name] for name, place in places.items() if place == file}, folder / file)
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(kind, clip, VOCABULARY) | changes))
    tokenizer = train_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    (folder / "tokenizer.model").write_bytes((tokenizer / "tokenizer.model").read_bytes())
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {**token, "content": "<s>"},
        "eos_token": {**token, "content": "</s>"},
        "unk_token": {**token, "content": "<unk>"},
        "pad_token": None,
        "model_max_length": 2048,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return state


def _config(kind: str, clip: Path, vocabulary: int) -> dict[str, Any]:
    llava = kind == "mlp2x_gelu"
    return {
        "architectures": ["LlavaLlamaForCausalLM" if llava else "MobileLlamaForCausalLM"],
        "model_type": "llava_llama" if llava else "mobilevlm",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "vocab_size": vocabulary,
        "use_mm_proj": True,
        "mm_vision_tower": str(clip),
        "mm_projector_type": kind,
        "mm_hidden_size": VISION,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        **({} if llava else {"vision_tower_type": "clip"}),
    }
