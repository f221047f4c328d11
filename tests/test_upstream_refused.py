"""Upstream's checkpoints that are damaged or ask for what is not supported are refused, and what is wrong is named."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.upstream import TOWER, random_tensors, save_upstream, shapes
from vlm.data.scenes.train_tokenizer import VOCABULARY
from vlm.errors import UserError
from vlm.models.checkpoint import load_checkpoint
from vlm.models.from_upstream import to_hf
from vlm.models.tensors import tensors

pytestmark = pytest.mark.usefixtures("own_cache")


def test_missing_extra_and_misshaped_tensors_are_all_listed(clip: Path, tmp_path: Path) -> None:
    state = random_tensors(shapes("ldpnetv2", VOCABULARY))
    del state["model.layers.1.mlp.up_proj.weight"], state[f"{TOWER}pre_layrnorm.bias"]
    state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    state["model.mm_projector.peg.peg.0.weight"] = torch.zeros(64, 1, 5, 5)
    save_upstream(tmp_path / "up", "ldpnetv2", clip, state)
    with pytest.raises(UserError) as error:
        to_hf(tmp_path / "up", tmp_path / "hf")
    text = str(error.value)
    assert f"2 missing: model.layers.1.mlp.up_proj.weight, {TOWER}pre_layrnorm.bias;" in text
    assert "1 extra: model.layers.7.mlp.up_proj.weight;" in text
    assert "1 misshaped: model.mm_projector.peg.peg.0.weight [64, 1, 5, 5] for [64, 1, 3, 3]" in text
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "ldpnet_v2"}, "mm_projector_type 'ldpnet_v2' is not supported.*Did you mean 'ldpnetv2'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True is not supported"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ({"hidden_size": "64"}, "hidden_size '64' found, a whole number expected"),
        ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer '-2' found, a whole number expected"),
        ({"mm_vision_select_layer": 4}, "mm_vision_select_layer 4 found, the tower has 3 layers"),
        ({"hidden_size": 63}, r"config\.json: transformers makes no model of these values .*63.* is not a multiple"),
        ({"num_attention_heads": 0}, r"config\.json: transformers makes no model"),
        ({"rope_scaling": {"type": "foo", "factor": 2.0}}, r"config\.json: transformers makes no model .*'foo'"),
        ({"hidden_act": "foo"}, r"config\.json: transformers makes no model .*KeyError: 'foo'"),
    ],
)
def test_what_is_not_supported_is_refused_by_key(changes: dict, message: str, clip: Path, tmp_path: Path) -> None:
    save_upstream(tmp_path / "up", "ldpnetv2", clip, **changes)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "up")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [(torch.ones(64, dtype=torch.int8), "is torch.int8, not floating"), (torch.full((64,), torch.nan), "holds NaN")],
)
def test_a_tensor_without_finite_numbers_is_refused(numbers: Tensor, message: str, clip: Path, tmp_path: Path) -> None:
    state = random_tensors(shapes("ldpnetv2", VOCABULARY))
    save_upstream(tmp_path / "up", "ldpnetv2", clip, state | {"model.norm.weight": numbers})
    with pytest.raises(UserError, match=rf"up: model\.norm\.weight {message}"):
        to_hf(tmp_path / "up", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_refused(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json"):
        dict(tensors(tmp_path))


def test_a_file_that_runs_code_is_not_loaded(clip: Path, tmp_path: Path) -> None:
    save_upstream(tmp_path / "up", "ldpnetv2", clip)
    torch.save({"a": Path("x")}, tmp_path / "up/pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not a file of tensors only"):
        load_checkpoint(tmp_path / "up")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.model", b"", r"tokenizer\.model: 3 tokens found, 775 \(vocab_size of config\.json\) expected"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", r"up: its tokenizer cannot be read"),
        ("tokenizer_config.json", b"{", r"up: its tokenizer cannot be read \(Expecting property name"),
        ("tokenizer_config.json", b"[]", r"up: its tokenizer cannot be read"),
    ],
)
def test_a_tokenizer_that_does_not_belong_to_the_weights_is_refused(
    file: str, content: bytes, message: str, clip: Path, tmp_path: Path
) -> None:
    save_upstream(tmp_path / "up", "ldpnetv2", clip)
    (tmp_path / "up" / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "up")


def test_a_missing_shard_is_named(clip: Path, tmp_path: Path) -> None:
    save_upstream(tmp_path / "up", "ldpnetv2", clip, shards=3)
    (tmp_path / "up/pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(UserError, match=r"names pytorch_model-00002-of-00003\.bin, which is not there"):
        load_checkpoint(tmp_path / "up")
