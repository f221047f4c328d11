"""A block of attention read beside fused attention equals what eager attention gives, for every kind of batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill import probe
from distill.probe import Block, Positions, attention_block, find_positions, read_attention, reading_attention
from tests.tiny import random_model
from vlm.data.collator import segment_mask
from vlm.errors import UserError

IMAGE = 299
SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES)),
    "llama without grouped queries": lambda: LlamaModel(LlamaConfig(**{**SIZES, "num_key_value_heads": 4})),
    "mistral": lambda: MistralModel(MistralConfig(**SIZES)),
    "qwen2, biases": lambda: Qwen2Model(Qwen2Config(**SIZES)),
    "qwen3, norms of queries and keys": lambda: Qwen3Model(Qwen3Config(**SIZES, head_dim=16)),
    "gemma": lambda: GemmaModel(GemmaConfig(**SIZES, head_dim=16)),
}
TEXT, PICTURE = [7], [IMAGE] * 6
SAMPLES = {
    "one image": [1, *TEXT * 2, *PICTURE, *TEXT * 5],
    "two images": [1, *PICTURE, *TEXT * 3, *PICTURE, *TEXT * 4],
    "no image": [1, *TEXT * 8],
    "image last": [1, *TEXT * 3, *PICTURE],
}
Inputs = tuple[Tensor, Tensor, Tensor]


def _model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.15)
    return model


def _padded(names: list[str], left: bool = False) -> Inputs:
    """Ids, segments and visibility of some samples, causal, padded on one side."""
    longest = max(len(SAMPLES[name]) for name in names)
    ids, segments = (torch.full((len(names), longest), fill) for fill in (0, -1))
    for row, name in enumerate(names):
        sample = torch.tensor(SAMPLES[name])
        where = slice(longest - len(sample), None) if left else slice(len(sample))
        ids[row, where], segments[row, where] = sample, 1
    return ids, segments, segment_mask(segments)


def _packed() -> Inputs:
    """Two records in one row, which cannot see each other, beside a row of one."""
    first, second, third = SAMPLES["one image"], SAMPLES["two images"], SAMPLES["no image"]
    ids = torch.tensor([first + second, third + [0] * (len(first) + len(second) - len(third))])
    segments = torch.tensor(
        [[1] * len(first) + [2] * len(second), [1] * len(third) + [-1] * (ids.shape[1] - len(third))]
    )
    return ids, segments, segment_mask(segments)


BATCHES: dict[str, Callable[[], Inputs]] = {
    "padded right": lambda: _padded(["one image", "no image", "two images", "image last"]),
    "padded left": lambda: _padded(["one image", "no image", "two images", "image last"], left=True),
    "packed": _packed,
}


def _arguments(model: PreTrainedModel, visible: Tensor, segments: Tensor) -> dict[str, Tensor | bool]:
    positions = (segments >= 0).cumsum(-1).clamp(min=1) - 1
    embeds = torch.randn(*segments.shape, model.config.hidden_size, dtype=model.dtype)
    mask = torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min)
    return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, "use_cache": False}


def _expected(eager: Tensor, where: Positions) -> Tensor:
    """The block cut out of all attention of a layer [B, H, N, N]."""
    batch = torch.arange(len(eager))[:, None, None]
    block = eager.transpose(1, 2)[batch, where.rows[:, :, None], :, where.columns[:, None, :]]  # [B, M, V, H]
    real = where.row_mask[:, :, None] & where.column_mask[:, None, :]  # [B, M, V]
    return (block * real[..., None]).permute(0, 3, 1, 2)


def _eager(model: PreTrainedModel, **arguments: object) -> tuple[Tensor, ...]:
    model.set_attn_implementation("eager")
    attentions: tuple[Tensor, ...] = model(**arguments, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return attentions


@pytest.mark.parametrize("batch", sorted(BATCHES))
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_block_equals_eager_attention(family: str, batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CHUNK", 1000)  # several chunks of rows
    model = _model(family)
    ids, segments, visible = BATCHES[batch]()
    arguments = _arguments(model, visible, segments)
    attentions = _eager(model, **arguments)
    with reading_attention(model, [0, -1]) as found:
        plain = model(**arguments).last_hidden_state
    torch.testing.assert_close(plain, model(**arguments).last_hidden_state)
    early = read_attention(model, [0, -1], **arguments)
    for block in ("text_vision", "vision_vision", "text_text", "full"):
        where = find_positions(ids, segments, visible, IMAGE, block)
        for layer in (0, 2):
            expected = _expected(attentions[layer], where)
            assert expected.abs().sum() > 0
            for read in (found, early):
                torch.testing.assert_close(attention_block(read[layer], visible, where), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_without_a_mask_every_earlier_position_is_seen() -> None:
    model = _model("mistral")
    ids, segments, visible = _padded(["one image", "no image", "two images"])
    arguments = _arguments(model, visible, segments)
    attentions = _eager(model, **arguments)
    read = read_attention(model, [1], **{**arguments, "attention_mask": None})
    where = find_positions(ids, segments, None, IMAGE)
    assert torch.equal(where.rows, find_positions(ids, segments, visible, IMAGE).rows)
    torch.testing.assert_close(
        attention_block(read[1], None, where), _expected(attentions[1], where), rtol=1e-4, atol=1e-6
    )


@torch.no_grad()
def test_in_bfloat16_the_block_is_that_of_the_rounded_queries_and_keys() -> None:
    model = _model("qwen3, norms of queries and keys").bfloat16()
    ids, segments, visible = BATCHES["padded right"]()
    arguments = _arguments(model, visible, segments)
    where = find_positions(ids, segments, visible, IMAGE)
    block = attention_block(read_attention(model, [0], **arguments)[0], visible, where)
    assert block.dtype == torch.float32
    torch.testing.assert_close(block, _expected(_eager(model, **arguments)[0].float(), where), rtol=0.05, atol=0.01)


def _gradients(model: PreTrainedModel, inputs: Inputs, arguments: dict, block: Block) -> tuple[Tensor, list[Tensor]]:
    ids, segments, visible = inputs
    where = find_positions(ids, segments, visible, IMAGE, block)
    with reading_attention(model, [1]) as read:
        states = model(**arguments).last_hidden_state
    value = attention_block(read[1], visible, where).square().sum()
    parameters = [p for n, p in model.named_parameters() if "layers.0" in n or "layers.1.self_attn" in n]
    alone = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    (value + states[segments >= 0].square().mean()).backward()
    return value, [g if g is not None else p.new_zeros(()) for g, p in zip(alone, parameters, strict=True)]


def test_the_gradient_is_that_of_eager_attention_with_and_without_gradient_checkpointing() -> None:
    inputs = BATCHES["packed"]()
    model = _model("llama").double().train()
    arguments = _arguments(model, inputs[2], inputs[1])
    where = find_positions(*inputs, IMAGE)
    value = _expected(_eager(model, **arguments)[1], where).square().sum()
    parameters = [p for n, p in model.named_parameters() if "layers.0" in n or "layers.1.self_attn" in n]
    expected = torch.autograd.grad(value, parameters, allow_unused=True)
    collected: list[list[Tensor]] = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        found, gradients = _gradients(model, inputs, arguments, "text_vision")
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-8)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, one.new_zeros(()) if other is None else other, rtol=1e-4, atol=1e-7)
        collected.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*collected, strict=True):
        torch.testing.assert_close(one, other)


def test_reentrant_gradient_checkpointing_is_refused() -> None:
    _, segments, visible = BATCHES["padded right"]()
    model = _model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    arguments = _arguments(model, visible, segments)
    arguments["inputs_embeds"].requires_grad_()
    with pytest.raises(UserError, match="use_reentrant"), reading_attention(model, [0]):
        model(**arguments)


def test_a_layers_own_attention_finds_its_own_name_in_the_configuration() -> None:
    """FlashAttention's function asks for it."""
    seen = []

    def own(module: torch.nn.Module, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        seen.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("own", own)
    model = _model("llama")
    model.set_attn_implementation("own")
    with reading_attention(model, [0]):
        model(torch.tensor([[1, 7, 7]]))
    assert seen == ["own"] * len(model.layers)


def test_nothing_of_the_reading_stays_behind() -> None:
    model = _model("llama")
    _, segments, visible = BATCHES["padded right"]()
    read_attention(model, [0], **_arguments(model, visible, segments))
    attention = model.layers[0].self_attn
    assert attention.config is model.config and not hasattr(attention, "keep")


def test_positions_follow_the_image_wherever_it_stands() -> None:
    ids, segments, visible = _padded(["one image", "no image", "two images", "image last"])
    where = find_positions(ids, segments, visible, IMAGE)
    rows = [row[mask].tolist() for row, mask in zip(where.rows, where.row_mask, strict=True)]
    columns = [row[mask].tolist() for row, mask in zip(where.columns, where.column_mask, strict=True)]
    assert rows == [[9, 10, 11, 12, 13], [], [7, 8, 9, 16, 17, 18, 19], []]
    assert columns == [list(range(3, 9)), [], [*range(1, 7), *range(10, 16)], list(range(4, 10))]
    full = find_positions(ids, segments, visible, IMAGE, "full")
    assert full.row_mask.sum(-1).tolist() == [14, 9, 20, 10]


@torch.no_grad()
def test_dense_attention_equals_eager() -> None:
    from distill.dense_attention import DENSE, additive_mask

    decoder = random_model(300, IMAGE, num_key_value_heads=2).model.language_model
    _, segments, visible = BATCHES["padded right"]()
    for mask, real in ((additive_mask(visible), segments >= 0), (None, segments > -2)):
        inputs = {"inputs_embeds": torch.randn(*segments.shape, 64), "attention_mask": mask, "use_cache": False}
        states = {}
        for implementation in (DENSE, "eager"):
            decoder.set_attn_implementation(implementation)
            states[implementation] = decoder(**inputs).last_hidden_state
        torch.testing.assert_close(states[DENSE][real], states["eager"][real], rtol=1e-4, atol=1e-4)
