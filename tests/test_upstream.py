"""Upstream's checkpoints are read, written back bit for bit, and refused with what is wrong with them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tests.upstream import PROJECTORS, TOWER, random_tensors, save_clip, save_upstream, shapes
from vlm.data.scenes.train_tokenizer import VOCABULARY
from vlm.errors import UserError
from vlm.models.checkpoint import load_checkpoint, save_checkpoint
from vlm.models.from_upstream import grow, to_hf
from vlm.models.mobilevlm import DECODERS, MobileVlmForConditionalGeneration, published_config
from vlm.models.tensors import tensors
from vlm.models.to_upstream import to_upstream
from vlm.prompts import TEMPLATES
from vlm.runtimes.torch import TorchRuntime

KINDS = list(PROJECTORS)


pytestmark = pytest.mark.usefixtures("own_cache")


def mlp(state: dict[str, Tensor], first: str, second: str, x: Tensor) -> Tensor:
    """The two linears of every projector, from upstream's tensors."""
    at = "model.mm_projector."
    x = x @ state[f"{at}{first}.weight"].float().T + state[f"{at}{first}.bias"].float()
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    return x @ state[f"{at}{second}.weight"].float().T + state[f"{at}{second}.bias"].float()


def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """3x3 depthwise convolution of x [B, G, G, C] with a border of zeros, as a sum of nine shifted pictures."""
    grid, padded = x.shape[1], F.pad(x, (0, 0, 1, 1, 1, 1))
    shifted = [
        padded[:, i : i + grid : stride, j : j + grid : stride] * weight[:, 0, i, j] for i in range(3) for j in range(3)
    ]
    return torch.stack(shifted).sum(0)


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last dimension, written out."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def reference(kind: str, state: dict[str, Tensor], features: Tensor) -> Tensor:
    """The projectors as their papers draw them, channels last, without a convolution."""
    if kind == "mlp2x_gelu":
        return mlp(state, "0", "2", features)
    if kind == "ldpnetv2":
        x = mlp(state, "mlp.mlp.0", "mlp.mlp.2", features).reshape(-1, 12, 2, 12, 2, 64).mean((2, 4))  # [B, 12, 12, C]
        peg = {leaf: state[f"model.mm_projector.peg.peg.0.{leaf}"].float() for leaf in ("weight", "bias")}
        return (depthwise(x, peg["weight"], 1) + peg["bias"] + x).flatten(1, 2)
    x = mlp(state, "model.mlp.1", "model.mlp.3", features).reshape(-1, 24, 24, 64)  # [B, 24, 24, C]
    for block, stride in ((1, 1), (2, 2)):
        at = f"model.mm_projector.model.mb_block.{block}.block."
        part = {name.removeprefix(at): tensor.float() for name, tensor in state.items() if name.startswith(at)}
        y = channel_norm(depthwise(x, part["0.0.weight"], stride), part["0.1.weight"], part["0.1.bias"])
        y = y * (y + 3).clamp(0, 6) / 6
        scale = y.mean((1, 2))  # [B, C]
        scale = (scale @ part["1.fc1.weight"][..., 0, 0].T + part["1.fc1.bias"]).clamp(min=0)
        scale = scale @ part["1.fc2.weight"][..., 0, 0].T + part["1.fc2.bias"]
        y = y * ((scale + 3).clamp(0, 6) / 6)[:, None, None]
        y = channel_norm(y @ part["2.0.weight"][..., 0, 0].T, part["2.1.weight"], part["2.1.bias"])
        x = y + x if stride == 1 else y
    return x.flatten(1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_projector_computes_its_formula(kind: str, clip: Path, tmp_path: Path) -> None:
    state = save_upstream(tmp_path / "up", kind, clip)
    model = load_checkpoint(tmp_path / "up").model
    features = torch.randn(2, 576, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.model.multi_modal_projector(features)
    assert found.shape == (2, model.config.image_seq_length, 64)
    torch.testing.assert_close(found, reference(kind, state, features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_to_hf_and_back_is_bitwise_the_same(kind: str, clip: Path, tmp_path: Path) -> None:
    state = save_upstream(tmp_path / "up", kind, clip, shards=3)
    to_hf(tmp_path / "up", tmp_path / "hf", shard_bytes=100_000)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    back = dict(tensors(to_upstream(tmp_path / "hf", tmp_path / "back", shard_bytes=100_000)))
    assert back.keys() == state.keys()
    assert [
        name for name in state if back[name].dtype != state[name].dtype or not torch.equal(back[name], state[name])
    ] == []
    told, kept = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("up", "back"))
    assert {key: kept.get(key) for key in told} == told
    assert (tmp_path / "back/tokenizer.model").read_bytes() == (tmp_path / "up/tokenizer.model").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_processor_and_model_work_together(kind: str, clip: Path, tmp_path: Path) -> None:
    save_upstream(tmp_path / "up", kind, clip)
    checkpoint = load_checkpoint(tmp_path / "up")
    picture, question = Image.effect_noise((60, 40), 90).convert("RGB"), "What color is it?"
    before, after = TEMPLATES["v1"](question)
    inputs = AutoProcessor.from_pretrained(checkpoint.folder)(picture, f"{before}<image>{after}", return_tensors="pt")
    runtime = TorchRuntime(checkpoint)
    assert inputs["input_ids"][0].tolist() == runtime.prompt(question)
    with torch.no_grad():
        theirs = checkpoint.model(**inputs).logits[0, -1]
    ours = runtime.forward(
        runtime.prompt_embeds(runtime.prompt(question), runtime.encode_image(runtime.pixels(picture)))
    )
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_and_saves_what_was_converted(kind: str, clip: Path, tmp_path: Path) -> None:
    save_upstream(tmp_path / "up", kind, clip)
    folder = to_hf(tmp_path / "up", tmp_path / "hf")
    first, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    assert isinstance(first, MobileVlmForConditionalGeneration) == kind.startswith("ldp")
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert {name: tensor.dtype for name, tensor in second.state_dict().items()} == {
        name: tensor.dtype for name, tensor in first.state_dict().items()
    }
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert AutoConfig.from_pretrained(tmp_path / "again").to_dict()["upstream"]["mm_projector_type"] == kind
    # And what transformers wrote goes back to upstream's names too.
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "again")
    (tmp_path / "again/tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    assert dict(tensors(to_upstream(tmp_path / "again", tmp_path / "back"))).keys() == shapes(kind, VOCABULARY).keys()


def test_a_checkpoint_without_a_tower_takes_the_clip_it_names(tmp_path: Path) -> None:
    tower = save_clip(tmp_path / "clip")
    whole = random_tensors(shapes("ldpnet", VOCABULARY))
    save_upstream(
        tmp_path / "up", "ldpnet", tmp_path / "gone", {k: v for k, v in whole.items() if not k.startswith(TOWER)}
    )
    with pytest.raises(UserError, match=r"the weights of its vision tower .*gone.*--vision"):
        load_checkpoint(tmp_path / "up")
    to_hf(tmp_path / "up", tmp_path / "hf", vision=tmp_path / "clip")
    back = dict(tensors(to_upstream(tmp_path / "hf", tmp_path / "back")))
    assert all(torch.equal(back[name], tensor) for name, tensor in (whole | tower).items())


def test_a_tower_saved_by_transformers_5_is_understood(clip: Path, tmp_path: Path) -> None:
    whole = random_tensors(shapes("ldpnetv2", VOCABULARY))
    short = {name.replace(".vision_model.", "."): tensor for name, tensor in whole.items()}
    save_upstream(tmp_path / "up", "ldpnetv2", clip, short)
    back = dict(tensors(to_upstream(to_hf(tmp_path / "up", tmp_path / "hf"), tmp_path / "back")))
    assert back.keys() == whole.keys()


def test_files_of_old_pytorch_are_read(clip: Path, tmp_path: Path) -> None:
    state = save_upstream(tmp_path / "up", "mlp2x_gelu", clip)
    torch.save(state, tmp_path / "up/pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert dict(tensors(tmp_path / "up")).keys() == state.keys()


def test_a_checkpoint_is_converted_once(clip: Path, tmp_path: Path) -> None:
    save_upstream(tmp_path / "up", "ldpnetv2", clip)
    first = load_checkpoint(tmp_path / "up").folder
    written = (first / "config.json").stat().st_mtime_ns
    assert load_checkpoint(tmp_path / "up").folder == first
    assert (first / "config.json").stat().st_mtime_ns == written


def test_a_token_without_an_embedding_of_its_own_is_never_the_likeliest() -> None:
    head = torch.randn(50, 16)
    logits = grow(head, 64) @ torch.randn(16, 100)  # [64, 100]
    assert int(logits.argmax(0).max()) < 50
    torch.testing.assert_close(logits[50:], logits[:50].mean(0).expand(14, -1), rtol=1e-4, atol=1e-4)


def test_pictures_are_prepared_as_the_checkpoint_was_trained(clip: Path, tmp_path: Path) -> None:
    clip.joinpath("preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.25], "size": 96}))
    save_upstream(tmp_path / "pad", "ldpnetv2", clip)
    save_upstream(tmp_path / "crop", "ldpnetv2", clip, image_aspect_ratio=None)
    padded, cropped = (load_checkpoint(tmp_path / name) for name in ("pad", "crop"))
    assert (padded.preprocessing.square, cropped.preprocessing.square) == ("pad", "crop")
    assert padded.preprocessing.mean == (0.5, 0.5, 0.25) and padded.preprocessing.pad_colour == (127, 127, 63)
    save_checkpoint(cropped.model, cropped.folder, cropped.preprocessing, tmp_path)
    assert load_checkpoint(tmp_path).preprocessing == cropped.preprocessing
    kept = json.loads((to_upstream(cropped.folder, tmp_path / "back") / "config.json").read_text())
    assert kept["image_aspect_ratio"] is None


@pytest.mark.parametrize("projector", ["ldpnet", "ldpnetv2"])
@pytest.mark.parametrize(("size", "billions"), [("1.7b", (1.6, 1.75)), ("3b", (2.9, 3.1)), ("7b", (6.9, 7.2))])
def test_published_sizes_have_as_many_parameters_as_their_name_says(
    size: str, billions: tuple[float, float], projector: str
) -> None:
    config = published_config(size, projector)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in MobileVlmForConditionalGeneration(config).parameters())
    assert billions[0] < count / 1e9 < billions[1]
    assert config.image_seq_length == 144 and size in DECODERS


def test_the_tower_keeps_its_values(clip: Path, tmp_path: Path) -> None:
    state = save_upstream(tmp_path / "up", "ldpnetv2", clip)
    written = load_file(to_hf(tmp_path / "up", tmp_path / "hf") / "model.safetensors")
    for name, tensor in state.items():
        if name.startswith(TOWER):
            assert torch.equal(written["model.vision_tower." + name.removeprefix(TOWER)], tensor)
