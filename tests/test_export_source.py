"""Weights of an export are read from their files one at a time, as they are stored."""

import re
from pathlib import Path

import pytest
import torch

from export.source import Weights, in_float32, open_checkpoint, release_pages, with_weights
from tests.tiny import save_random_checkpoint
from vlm.errors import UserError
from vlm.models.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint stored in float16."""
    folder = save_random_checkpoint(tmp_path_factory.mktemp("half") / "checkpoint")
    load_checkpoint(folder, dtype=torch.float16).model.save_pretrained(folder)
    return folder


def test_weights_are_those_of_the_loaded_model_in_the_type_they_are_stored_in(half: Path) -> None:
    weights, truth = Weights(half), load_checkpoint(half).model.state_dict()
    assert list(weights) == [name for name, _ in load_checkpoint(half).model.named_parameters()]
    for name in weights:
        assert weights.stored(name).dtype == torch.float16 and weights.read(name).dtype == torch.float32
        assert torch.equal(weights.read(name), truth[name]) and weights.shapes[name] == truth[name].shape


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped where")
def test_stored_weights_are_views_of_the_file(half: Path) -> None:
    weights = Weights(half)
    address = weights.stored("lm_head.weight").data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            assert line.endswith("model.safetensors")
            return
    pytest.fail("not mapped at all")


def test_reading_copies_also_where_the_type_is_the_same(random_checkpoint: Path) -> None:
    weights = Weights(random_checkpoint)
    weights.read("lm_head.weight").zero_()
    assert weights.stored("lm_head.weight").any()


def test_a_module_in_float32_leaves_the_checkpoint_as_it_is(half: Path) -> None:
    weights = Weights(half)
    assert in_float32(weights.model.lm_head).weight.dtype == torch.float32
    assert weights.stored("lm_head.weight").dtype == torch.float16


def test_an_unknown_parameter_is_named(random_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"no parameter 'lm_head\.bias'"):
        Weights(random_checkpoint).stored("lm_head.bias")


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="only Linux says what is mapped")
def test_pages_that_were_released_are_read_from_the_file_again(half: Path) -> None:
    def resident() -> int:
        found = re.findall(
            rf"{half}/[^\n]*safetensors\n(?:[^\n]*\n)*?Rss: +(\d+)", Path("/proc/self/smaps").read_text()
        )
        return sum(map(int, found))

    checkpoint = open_checkpoint(half)
    before = {name: parameter.sum().item() for name, parameter in checkpoint.model.named_parameters()}
    read = resident()
    release_pages(checkpoint)
    assert resident() < read / 4
    assert before == {name: parameter.sum().item() for name, parameter in checkpoint.model.named_parameters()}


def test_releasing_leaves_weights_that_are_in_no_file(random_checkpoint: Path) -> None:
    checkpoint = with_weights(open_checkpoint(random_checkpoint), {})
    weight = checkpoint.model.lm_head.weight
    weight.data = weight.data.clone() + 1  # what training does
    kept = weight.data.clone()
    release_pages(checkpoint)
    assert torch.equal(weight.data, kept)
