"""Turns that share an image's prefix are trained exactly as if each were alone."""

import torch

from tests.tiny import random_model
from vlm.data.collator import IGNORE, Encoder, Row, collate
from vlm.data.records import Record, scene_captions, scene_conversations
from vlm.data.scenes.scene import TOWER_START

IMAGE, BOS, EOS = 299, 1, 2


class Letters:
    """A tokenizer whose ids are character codes, so that expectations can be written down."""

    def encode(self, text: str) -> list[int]:
        """One id a character."""
        return [3 + ord(c) % 250 for c in text]


def _row(*turns: tuple[list[int], list[int]], image: bool = True) -> Row:
    prefix = [BOS, *([IMAGE] * 144 if image else [])]
    return Row(
        prefix, [([*asked, *said], [IGNORE] * len(asked) + said) for asked, said in turns], "x" if image else None
    )


def _loss_terms(batch: dict, model: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    from distill.merge import merge_vision

    tokens = model.model.multi_modal_projector(features)
    embeds = merge_vision(model, batch["input_ids"], tokens)
    inputs = {"attention_mask": batch["attention_mask"], "position_ids": batch["position_ids"]}
    states = model.model.language_model(inputs_embeds=embeds, **inputs, use_cache=False).last_hidden_state
    answers = batch["labels"] != IGNORE
    logits = model.lm_head(states[answers])
    return torch.nn.functional.cross_entropy(logits, batch["labels"][answers], reduction="none")


@torch.no_grad()
def test_packed_turns_equal_single_turns() -> None:
    model = random_model(300, IMAGE)
    first, second = ([10, 11, 12], [20, EOS]), ([13, 14], [21, 22, EOS])
    features = torch.randn(1, 576, 32)
    packed = _loss_terms(collate([_row(first, second)]), model, features)
    alone = torch.cat([_loss_terms(collate([_row(turn)]), model, features) for turn in (first, second)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_ragged_batch_with_text_only_rows_equals_rows_alone() -> None:
    model = random_model(300, IMAGE)
    rows = [_row(([10] * 9, [20, EOS])), _row(([12], [21, EOS]), image=False), _row(([13, 14], [22, EOS]))]
    features = torch.randn(2, 576, 32)
    together = _loss_terms(collate(rows), model, features)
    split = [features[:1], features[:0], features[1:]]
    alone = torch.cat([_loss_terms(collate([row]), model, f) for row, f in zip(rows, split, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_labels_stand_on_the_position_that_predicts_them() -> None:
    batch = collate([_row(([10, 11], [20, EOS]))])
    labels = batch["labels"][0].tolist()
    assert labels[145:149] == [IGNORE, 20, EOS, IGNORE]


def test_a_caption_is_predicted_from_the_image_on() -> None:
    encoder = Encoder(Letters(), BOS, EOS, IMAGE, 144, 512)
    row = encoder.row(Record("r", "scenes:1", (("", "ab"),), "plain"))
    labels = collate([row])["labels"][0].tolist()
    assert labels[144:148] == [*Letters().encode("ab\n"), IGNORE]


def test_a_turn_too_long_for_the_context_is_removed_not_truncated() -> None:
    encoder = Encoder(Letters(), BOS, EOS, IMAGE, 144, 330)
    long, short = ("q" * 400, "a"), ("q", "b")
    row = encoder.row(Record("r", "scenes:1", (long, short), "v1"))
    assert len(row.turns) == 1
    assert len(row.too_long) == 1 and row.too_long[0] > 144 + 400
    assert row.turns[0][1][-2:] == [*Letters().encode("b"), EOS]


def test_scene_records_are_deterministic_and_lazy() -> None:
    assert scene_conversations(5, 10)[3] == scene_conversations(5, 10)[3]
    assert scene_captions(5, 10)[3].image == "scenes:8"
    assert len(scene_conversations(TOWER_START, 10**9)) == 10**9
