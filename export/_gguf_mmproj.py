"""mmproj.gguf, the vision tower as stock llama.cpp reads it, and how far stock llama.cpp's answer is from the truth.

llama.cpp 0.5.0 (llama-cpp-python 0.3.36) appends the class token last and indexes positions and patches as if it stood
first (issue 25814), so its vision tokens are wrong whatever the file holds. The file waits for the day that is fixed.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType
from PIL import Image
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from export._gguf_vision import Q8_0, q8_0
from export.graph import VisionEncoder
from export.source import names_in
from vlm.models.checkpoint import Checkpoint
from vlm.models.mobilevlm import LDPv2
from vlm.preprocess import pixel_values

GRID = 24  # llama.cpp's ldpv2 graph has this number of patches per side written into it
_SECONDS = 600
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


@dataclass(frozen=True)
class Measured:
    """Cosine of stock llama.cpp's vision tokens with torch's on one picture, worst and mean; or why there is none."""

    cosine_min: float | None
    cosine_mean: float | None
    failure: str = ""


def unsupported(checkpoint: Checkpoint) -> str:
    """Say why stock llama.cpp has no graph for this vision tower, or return an empty string."""
    vision: Any = checkpoint.model.config.vision_config
    projector = checkpoint.model.model.multi_modal_projector
    if isinstance(projector, LlavaMultiModalProjector):
        return "" if checkpoint.model.config.projector_hidden_act == "gelu" else "llama.cpp's projector has a gelu"
    if not isinstance(projector, LDPv2):
        return "only the projectors LDPv2 and LLaVA's MLP are written"
    grid = vision.image_size // vision.patch_size
    return "" if grid == GRID else f"llama.cpp's LDPv2 graph takes {GRID} patches per side, the tower has {grid}"


def write_mmproj(checkpoint: Checkpoint, encoder: VisionEncoder, path: Path, rounded: list[str]) -> None:
    """Write vision tower and projector under llama.cpp's names, matrices as float16, or q8_0 where `rounded` says so.

    Args:
        checkpoint: the model.
        encoder: its vision tower and projector, float32.
        path: gets the file.
        rounded: the checkpoint's names of matrices (`export._gguf_vision.eight_bit`).
    """
    vision: Any = checkpoint.model.config.vision_config
    count = len(encoder.layers)
    writer = GGUFWriter(path, "clip")
    writer.add_name(checkpoint.folder.name)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if rounded else LlamaFileType.MOSTLY_F16)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_bool("clip.use_gelu", vision.hidden_act == "gelu")  # else quick_gelu
    writer.add_string("clip.projector_type", "ldpv2" if isinstance(encoder.projector, LDPv2) else "mlp")
    for key, value in {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "projection_dim": vision.projection_dim,
        "attention.head_count": vision.num_attention_heads,
        "block_count": count,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    # Without this llama.cpp would stop one layer before the last one that is in the file.
    writer.add_array("clip.vision.feature_layer", [count])
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", list(checkpoint.facts.preprocessing.mean))
    writer.add_array("clip.vision.image_std", list(checkpoint.facts.preprocessing.std))
    theirs, tensors = names_in(checkpoint, VisionEncoder(checkpoint.model)), _tensors(encoder)
    eight_bit = {id(encoder.get_parameter(ours)) for ours, name in theirs.items() if name in rounded}
    for name, tensor in tensors.items():
        if id(tensor) in eight_bit:
            writer.add_tensor(name, q8_0(tensor.detach().numpy()), raw_dtype=Q8_0)
            continue
        half = tensor.ndim > 1
        writer.add_tensor(name, tensor.detach().to(torch.float16 if half else torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(encoder: VisionEncoder) -> dict[str, torch.Tensor]:
    projector: Any = encoder.projector
    tensors = {
        "v.class_embd": encoder.embeddings.class_embedding,
        "v.patch_embd.weight": encoder.embeddings.patch_embedding.weight,
        "v.position_embd.weight": encoder.embeddings.position_embedding.weight,
    }
    modules: dict[str, Any] = {"v.pre_ln": encoder.pre_layrnorm}
    mlp = "mm"
    if isinstance(projector, LDPv2):
        # llama.cpp aborts on a float32 kernel here, so it must stay a matrix [D, 3, 3] that is stored as float16.
        tensors |= {"mm.model.peg.0.weight": projector.peg.weight.squeeze(1), "mm.model.peg.0.bias": projector.peg.bias}
        mlp = "mm.model.mlp"
    modules |= {f"{mlp}.0": projector.linear_1, f"{mlp}.2": projector.linear_2}
    for index, layer in enumerate(encoder.layers):
        modules |= {f"v.blk.{index}.{theirs}": layer.get_submodule(ours) for ours, theirs in _LAYER.items()}
    for name, module in modules.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = module.weight, module.bias
    return tensors


def measure(checkpoint: Checkpoint, encoder: VisionEncoder, decoder: Path, mmproj: Path) -> Measured:
    """Encode one picture with stock llama.cpp, in a process of its own because it may abort, and compare with torch.

    Args:
        checkpoint: says how pictures are prepared.
        encoder: its vision tower and projector, float32.
        decoder: the .gguf that llama.cpp wants beside the tower.
        mmproj: the tower.
    """
    image = probe_image(checkpoint.facts.preprocessing.size)
    with torch.inference_mode():
        pixels = torch.from_numpy(pixel_values(image, checkpoint.facts.preprocessing))
        truth = encoder(pixels)[0][0].numpy()  # [V, D]
    with TemporaryDirectory() as scratch:
        picture, out = Path(scratch, "probe.png"), Path(scratch, "tokens.npy")
        image.save(picture)
        command = [sys.executable, "-m", "export._gguf_mmproj_probe", str(decoder), str(mmproj), str(picture), str(out)]
        root = Path(__file__).resolve().parent.parent
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return Measured(None, None, f"llama.cpp gave no answer within {_SECONDS} s")
        if done.returncode != 0 or not out.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return Measured(None, None, f"llama.cpp's process ended with code {done.returncode}: {last}")
        tokens = np.load(out).reshape(truth.shape)  # [V, D]
    cosine = (tokens * truth).sum(-1) / np.linalg.norm(tokens, axis=-1) / np.linalg.norm(truth, axis=-1)  # [V]
    return Measured(float(cosine.min()), float(cosine.mean()))


def probe_image(size: int) -> Image.Image:
    """Draw ramps and a block, in which no two patches are alike, so that a patch in the wrong place shows."""
    y, x = np.mgrid[0:size, 0:size] * (96.0 / size)
    pixels = np.stack([x * 2.5 % 256, y * 2.5 % 256, (x + y) * 1.3 % 256], -1).astype(np.uint8)  # [S, S, 3]
    pixels[size // 3 : size // 2, size // 5 : size * 3 // 4] = (200, 30, 60)
    return Image.fromarray(pixels)
