"""Compares logits with upstream's own code: `python -m benchmarks.upstream_logits --upstream FOLDER [--extra FOLDER]`.

The first folder is a clone of github.com/Meituan-AutoML/MobileVLM. Its model is built tiny with random weights, saved
under the published names, and loaded here as every upstream checkpoint is; both read the same prompts in float32.
Upstream's projectors need torchvision and timm, which this project does not have; put them into a folder of their own:
`pip install --no-deps --target EXTRA torchvision timm==0.9.12`.

Upstream's code runs as it is, also under transformers 5. What is bent from outside, in memory, is torchvision: without
its compiled operators (a build for another torch) it imports only if the names of two of them exist; none is called.

Exit code 1: a difference above the bar, 1e-4.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel

from vlm.data.scenes.train_tokenizer import train_tokenizer
from vlm.models.checkpoint import load_checkpoint
from vlm.models.from_upstream import to_hf
from vlm.models.mobilevlm import MobileVlmConfig
from vlm.models.tensors import tensors
from vlm.models.to_upstream import to_upstream
from vlm.models.upstream import published_name
from vlm.prompts import TEMPLATES, prompt_ids
from vlm.runtimes.torch import TorchRuntime

BAR = 1e-4
# MobileVLM's code also builds the projector of LLaVA-1.5.
KINDS = {"V1": "ldpnet", "V2": "ldpnetv2", "LLaVA-1.5": "mlp2x_gelu"}
SIZE, PATCH, VISION_DIM = 96, 4, 32
QUESTIONS = ("What color is the circle?", "Is there a red square in the image?\nAnswer yes or no.")


class SlowTokenizer:
    """What upstream's version of transformers makes of tokenizer.model: bos, then sentencepiece's own ids."""

    bos_token_id = 1

    def __init__(self, path: Path) -> None:
        self.pieces = SentencePieceProcessor(model_file=str(path))

    def __call__(self, text: str) -> SimpleNamespace:
        """Return the ids of `text` as an attribute `input_ids`."""
        return SimpleNamespace(input_ids=[self.bos_token_id, *self.pieces.encode(text)])


def import_upstream(folder: Path, extra: Path | None) -> Any:
    """Import upstream's module of models, `mobilevlm.model.mobilellama`, and its tokenizing functions."""
    sys.path.insert(0, str(folder))
    if extra:
        sys.path.append(str(extra))
    try:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from mobilevlm import conversation, utils
        from mobilevlm.model import mobilellama
    except ImportError as error:
        message = f"{error}. Expected a clone of MobileVLM in {folder}, and timm and torchvision (--extra)."
        raise SystemExit(message) from error
    AutoConfig.register(MobileVlmConfig.model_type, MobileVlmConfig, exist_ok=True)  # upstream took the name over
    return mobilellama, conversation.conv_templates["v1"], utils.tokenizer_image_token, operators


def save_tower(folder: Path) -> None:
    """Save a random CLIP vision model of 24 x 24 patches, the grid of the real one."""
    sizes = {"hidden_size": VISION_DIM, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=PATCH, hidden_act="quick_gelu")
    CLIPVisionModel(config).save_pretrained(folder)


def build(upstream: Any, kind: str, clip: Path, vocabulary: int) -> Any:
    """Upstream's own model with random weights, large enough that a wrong graph shows."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = upstream.MobileVLMConfig(
        **sizes,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        mm_vision_tower=str(clip),
        mm_projector_type=kind,
        mm_hidden_size=VISION_DIM,
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        vision_tower_type="clip",
        image_aspect_ratio="pad",
    )
    model = upstream.MobileLlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.08)
    return model


def save(model: Any, tokenizer: Path, folder: Path) -> dict[str, Tensor]:
    """Save upstream's model as the published checkpoints are; returns its tensors by name."""
    folder.mkdir()
    state = {published_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    keys = model.config.to_dict()
    rope = keys.pop("rope_parameters")  # transformers 4.33 knew the key below instead
    (folder / "config.json").write_text(json.dumps({**keys, "rope_theta": rope["rope_theta"]}, default=str))
    (folder / "tokenizer.model").write_bytes((tokenizer / "tokenizer.model").read_bytes())
    return state


@torch.no_grad()
def compare(model: Any, runtime: TorchRuntime, conversation: Any, tokenize: Any, tokenizer: Any) -> tuple[float, float]:
    """Return the largest difference of the logits of all positions over the questions, and the largest logit."""
    facts, worst, largest = runtime.facts, 0.0, 0.0
    for question in QUESTIONS:
        pixels = torch.randn(1, 3, SIZE, SIZE)
        prompt = conversation.copy()
        prompt.append_message(prompt.roles[0], f"<image>\n{question}")
        prompt.append_message(prompt.roles[1], None)
        theirs_ids = tokenize(prompt.get_prompt(), tokenizer, return_tensors="pt")[None]  # [1, N - V + 1]
        ids = prompt_ids(TEMPLATES["v1"](question), runtime.tokenizer, facts.bos_id, facts.image_token_id, 1)
        if [-200 if token == facts.image_token_id else token for token in ids] != theirs_ids[0].tolist():
            raise SystemExit(f"the prompt of {question!r} has other tokens than upstream's.")
        theirs = model(input_ids=theirs_ids, images=pixels).logits  # [1, N, vocabulary]
        ids = runtime.prompt(question)
        ours = runtime.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits  # [1, N, rows]
        worst = max(worst, float((ours[..., : theirs.shape[-1]] - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
    return worst, largest


def main() -> int:
    """Run all versions; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compares logits with upstream's own code.")
    parser.add_argument("--upstream", type=Path, required=True, help="clone of Meituan-AutoML/MobileVLM")
    parser.add_argument("--extra", type=Path, help="folder with torchvision and timm")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    upstream, conversation, tokenize, _operators = import_upstream(options.upstream.resolve(), options.extra)
    passed = True
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        tokenizer_folder = train_tokenizer(work / "tokenizer")
        for file in ("tokenizer.json", "tokenizer_config.json"):  # they know <image>, which upstream's do not
            (tokenizer_folder / file).unlink()
        save_tower(work / "clip")
        for version, kind in KINDS.items():
            tokenizer = SlowTokenizer(tokenizer_folder / "tokenizer.model")
            model = build(upstream, kind, work / "clip", tokenizer.pieces.get_piece_size())
            state = save(model, tokenizer_folder, work / version)
            ours = load_checkpoint(to_hf(work / version, work / f"{version}-hf"))
            worst, largest = compare(model, TorchRuntime(ours), conversation, tokenize, tokenizer)
            back = to_upstream(work / f"{version}-hf", work / f"{version}-back")
            same = all(torch.equal(tensor, state[key]) for key, tensor in tensors(back))
            passed &= worst <= BAR and same
            print(
                f"{version}: logits differ by at most {worst:.2e} (bar {BAR:.0e}, largest logit {largest:.1f}), ",
                end="",
            )
            print(f"{len(state)} tensors exported again {'bitwise equal' if same else 'CHANGED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
