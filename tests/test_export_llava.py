"""LLaVA-1.5 as transformers publishes it is exported like the project's own; other models are refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from export.config import ExportConfig
from export.graph import VisionEncoder
from export.run import export_one
from export.source import open_checkpoint, with_weights
from tests.artifacts import cosine
from tests.tiny import TEXT, VISION
from vlm.data.scenes.train_tokenizer import train_tokenizer
from vlm.errors import UserError
from vlm.manifest import Preprocessing, read_manifest
from vlm.models.checkpoint import save_checkpoint
from vlm.models.hf import llava_config
from vlm.preprocess import pixel_values

# Names in the checkpoints on the hub, which were written by transformers before 4.52, for today's.
OLD_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
CONFIG = ExportConfig(context_length=320, probes=2, threads=1)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA-1.5 of tiny size in float16, with the names and the middle crop of those on the hub."""
    root = tmp_path_factory.mktemp("llava")
    tokenizer_folder = train_tokenizer(root / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    vision = {"model_type": "clip_vision_model", **VISION, "patch_size": 8}
    text = {"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = llava_config(vision, text, tokenizer.convert_tokens_to_ids("<image>"))
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
    out = root / "llava-tiny"
    out.mkdir()
    save_checkpoint(model.half(), tokenizer_folder, Preprocessing(size=96, square="crop"), out)
    tensors = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        new = name.replace("language_model.model.", "language_model.") if name.startswith("model.") else name
        old = next((old + new.removeprefix(today) for today, old in OLD_NAMES.items() if new.startswith(today)), name)
        tensors[old.replace("vision_model.vision_model.", "vision_model.")] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(("target", "library"), [("gguf:f16", "llama_cpp"), ("coreml:int4", "coremltools")])
def test_it_is_exported_and_proven(llava: Path, tmp_path: Path, target: str, library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    manifest = read_manifest(export_one(llava, target, tmp_path, CONFIG))
    assert manifest.parity is not None and manifest.parity.passed
    assert manifest.image_tokens == 144 and manifest.preprocessing.square == "crop"


def test_stock_llama_cpp_reads_the_mlp_and_computes_the_tower_with_its_class_token_last(
    llava: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    from export._gguf_mmproj import probe_image
    from export._gguf_mmproj_probe import vision_tokens

    folder = export_one(llava, "gguf:f16", tmp_path, CONFIG)
    found, _ = vision_tokens(folder / "decoder.gguf", folder / "mmproj.gguf", np.asarray(probe_image(96)))
    checkpoint = with_weights(open_checkpoint(llava), {})
    encoder = VisionEncoder(checkpoint.model)
    pixels = torch.from_numpy(pixel_values(probe_image(96), checkpoint.facts.preprocessing))
    with torch.inference_mode():
        first = encoder.embeddings(pixels) - encoder.embeddings.position_embedding.weight  # [1, 1 + P, vision_dim]
        x = encoder.pre_layrnorm(first.roll(-1, 1) + encoder.embeddings.position_embedding.weight)
        for layer in encoder.layers:
            x = layer(x, attention_mask=None)
        truth = encoder.projector(x[:, 1:])[0].numpy()  # [V, D]
    assert cosine(found.reshape(truth.shape), truth) > 0.999


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy 'full' cannot be exported"),
        ("vision_feature_layer", [-2, -3], "vision_feature_layer 'list' cannot be exported"),
        ("model_type", "qwen2_5_vl", "model_type 'qwen2_5_vl' is not supported, expected one of mobilevlm, llava"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_with_the_list(
    llava: Path, tmp_path: Path, key: str, value: object, message: str
) -> None:
    for file in llava.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tree = json.loads((llava / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | {key: value}))
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)


def test_another_decoder_is_refused_by_name(llava: Path, tmp_path: Path) -> None:
    from transformers import LlavaConfig

    tokenizer = AutoTokenizer.from_pretrained(llava)
    tree = json.loads((llava / "config.json").read_text())
    text = {key: tree["text_config"][key] for key in TEXT} | {"model_type": "qwen2", "vocab_size": len(tokenizer)}
    config = LlavaConfig(
        vision_config=tree["vision_config"],
        text_config=text,
        image_seq_length=144,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save_checkpoint(LlavaForConditionalGeneration(config), llava, Preprocessing(size=96, square="crop"), tmp_path)
    with pytest.raises(UserError, match=r"text_config\.model_type 'qwen2' cannot be exported.*'llama'"):
        open_checkpoint(tmp_path)
