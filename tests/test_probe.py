"""The attention block read beside fused attention equals what eager attention gives."""

import pytest
import torch

from distill.probe import attention_block, capture_attention_inputs, find_positions, read_attention_inputs
from tests.tiny import random_model
from vlm.data.collator import IGNORE, Row, collate

IMAGE = 299


def _batch() -> dict[str, torch.Tensor]:
    def row(count: int, image: bool, turns: int) -> Row:
        prefix = [1, 5, *([IMAGE] * 144 if image else [])]
        return Row(prefix, [(list(range(10, 10 + count)), [IGNORE] * count) for _ in range(turns)], None)

    return collate([row(5, True, 2), row(3, False, 1), row(7, True, 1)])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_block_equals_eager_attention(layer: int, kv_heads: int) -> None:
    decoder = random_model(300, IMAGE, num_key_value_heads=kv_heads).model.language_model
    batch = _batch()
    mask = batch["attention_mask"]
    embeds = torch.randn(*batch["input_ids"].shape, 64)
    inputs = {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": batch["position_ids"],
        "use_cache": False,
    }
    positions = find_positions(batch["input_ids"], mask, IMAGE)
    with capture_attention_inputs(decoder, layer) as read:
        decoder(**inputs)
    attention = decoder.layers[layer].self_attn
    block = attention_block(attention, read["hidden"], read["rotary"], mask, positions)
    early = read_attention_inputs(decoder, layer, **inputs)
    torch.testing.assert_close(early["hidden"], read["hidden"])

    decoder.set_attn_implementation("eager")
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    eager = decoder(**{**inputs, "attention_mask": additive}, output_attentions=True).attentions[layer]  # [B, H, N, N]
    for sample in range(3):
        rows = positions.text[sample][positions.text_mask[sample]]
        columns = positions.vision[sample][positions.vision_mask[sample]]
        expected = eager[sample][:, rows][:, :, columns]
        found = block[sample][:, positions.text_mask[sample]][:, :, positions.vision_mask[sample]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_positions_follow_the_image_wherever_it_stands() -> None:
    batch = _batch()
    positions = find_positions(batch["input_ids"], batch["attention_mask"], IMAGE)
    assert positions.vision[0].tolist() == list(range(2, 146))
    assert positions.text[0][positions.text_mask[0]].tolist() == list(range(146, 156))
    assert not positions.vision_mask[1].any() and not positions.text_mask[1].any()  # text only
    assert positions.text[2][positions.text_mask[2]].tolist() == list(range(146, 153))  # no padding


@torch.no_grad()
def test_dense_attention_equals_eager() -> None:
    from distill.attention import DENSE, additive_mask

    decoder = random_model(300, IMAGE, num_key_value_heads=2).model.language_model
    batch = _batch()
    inputs = {
        "inputs_embeds": torch.randn(*batch["input_ids"].shape, 64),
        "attention_mask": additive_mask(batch["attention_mask"]),
        "position_ids": batch["position_ids"],
        "use_cache": False,
    }
    states = {}
    for implementation in (DENSE, "eager"):
        decoder.set_attn_implementation(implementation)
        states[implementation] = decoder(**inputs).last_hidden_state
    real = batch["segments"] >= 0
    torch.testing.assert_close(states[DENSE][real], states["eager"][real], rtol=1e-4, atol=1e-4)
