"""Turns that share a prefix, and records that share a row, are trained exactly as if each were alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.masking_utils import create_causal_mask

from distill.merge import merge_vision
from tests.tiny import random_model
from vlm.data.collator import IGNORE, Encoder, Row, collate
from vlm.data.llava import llava_record
from vlm.data.records import Record, scene_captions, scene_conversations
from vlm.data.scenes.scene import TOWER_START
from vlm.data.scenes.train_tokenizer import train_tokenizer
from vlm.prompts import V1_SYSTEM
from vlm.tokenizer import Tokenizer

IMAGE, BOS, EOS = 299, 1, 2


class Letters:
    """A tokenizer whose ids are character codes, so that expectations can be written down."""

    def encode(self, text: str) -> list[int]:
        """One id a character."""
        return [3 + ord(c) % 250 for c in text]

    def identity(self) -> str:
        """There is one such tokenizer."""
        return "letters"


def _row(*turns: tuple[list[int], list[int]], image: bool = True) -> Row:
    prefix = [BOS, *([IMAGE] * 144 if image else [])]
    return Row(
        prefix, [([*asked, *said], [IGNORE] * len(asked) + said) for asked, said in turns], ("x",) if image else ()
    )


def _conversation(asked: list[int], said: list[int], images: int = 1) -> Row:
    ids = [*[IMAGE] * 144 * images, *asked, *said]
    labels = [IGNORE] * (len(ids) - len(said)) + said
    return Row([BOS], [(ids, labels)], ("x",) * images, sequential=True)


def _loss_terms(batch: dict, model: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    tokens = model.model.multi_modal_projector(features)
    embeds = merge_vision(model, batch["input_ids"], tokens)
    mask = batch["attention_mask"]
    if mask is None:  # causal attention; the padding on the right is seen by padding only
        mask = torch.ones(batch["input_ids"].shape[1], batch["input_ids"].shape[1], dtype=torch.bool).tril()[None, None]
    inputs = {"attention_mask": mask, "position_ids": batch["position_ids"]}
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
    row = encoder.row(Record("r", ("scenes:1",), (("", "ab"),), "plain"))
    labels = collate([row])["labels"][0].tolist()
    assert labels[144:148] == [*Letters().encode("ab\n"), IGNORE]


def test_a_turn_too_long_for_the_context_is_removed_not_truncated() -> None:
    encoder = Encoder(Letters(), BOS, EOS, IMAGE, 144, 330)
    long, short = ("q" * 400, "a"), ("q", "b")
    row = encoder.row(Record("r", ("scenes:1",), (long, short), "v1"))
    assert len(row.turns) == 1
    assert len(row.too_long) == 1 and row.too_long[0] > 144 + 400
    assert row.turns[0][1][-2:] == [*Letters().encode("b"), EOS]


def test_scene_records_are_deterministic_and_lazy() -> None:
    assert scene_conversations(5, 10)[3] == scene_conversations(5, 10)[3]
    assert scene_captions(5, 10)[3].images == ("scenes:8",)
    assert len(scene_conversations(TOWER_START, 10**9)) == 10**9


@torch.no_grad()
def test_a_packed_row_gives_each_record_what_it_gives_alone() -> None:
    model = random_model(300, IMAGE)
    rows = [
        _conversation([10, 11], [20, EOS]),
        _conversation([12] * 5, [21, 22, EOS], images=0),
        _conversation([13], [23, EOS], images=2),
        _row(([14], [24, EOS]), ([15, 16], [25, EOS])),
    ]
    features = torch.randn(4, 576, 32)
    packed = _loss_terms(collate(rows, [3, 1]), model, features)
    each = [features[:1], features[:0], features[1:3], features[3:]]
    alone = torch.cat([_loss_terms(collate([row]), model, f) for row, f in zip(rows, each, strict=True)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_a_packed_row_says_which_record_each_token_is_of() -> None:
    batch = collate([_conversation([10], [20]), _conversation([11], [21], images=0), _row(([12], [22]))], [2, 1])
    assert batch["records"][0].tolist() == [0] * 147 + [1] * 3
    assert batch["position_ids"][0, 147:].tolist() == [0, 1, 2]
    assert batch["segments"][0, 145:].tolist() == [1, 1, 0, 1, 1]
    assert batch["records"][1, 147:].tolist() == [-1] * 3


def test_conversations_without_packing_need_no_mask() -> None:
    rows = [_conversation([10], [20]), _conversation([11], [21], images=0)]
    assert collate(rows)["attention_mask"] is None
    assert collate(rows, [2])["attention_mask"] is not None
    assert collate([*rows, _row(([12], [22]))])["attention_mask"] is not None


def test_conversations_of_different_lengths_are_still_plain_causal_attention_to_transformers() -> None:
    rows = [_conversation([10, 11, 12], [20]), _conversation([11], [21], images=0)]
    batch = collate(rows)
    model = random_model(300, IMAGE).model.language_model
    embeds = torch.zeros(*batch["input_ids"].shape, model.config.hidden_size)
    arguments = {"attention_mask": None, "past_key_values": None, "position_ids": batch["position_ids"]}
    model.set_attn_implementation("sdpa")
    assert create_causal_mask(model.config, embeds, **arguments) is None


def test_a_second_turn_without_a_question_is_refused() -> None:
    with pytest.raises(ValueError, match="a record can have only one"):
        collate([_row(([], [20, EOS]), ([], [21, EOS]))])


def _flat(record: Record) -> tuple[list[int], list[int]]:
    row = Encoder(Letters(), BOS, EOS, IMAGE, 2, 4096).row(record)
    ((ids, labels),) = row.turns
    return [*row.prefix, *ids], [IGNORE, *labels]


def test_a_conversation_is_as_upstream_writes_it() -> None:
    row = {
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "human", "value": "is <image> like <image>?"},
            {"from": "gpt", "value": "no"},
            {"from": "human", "value": "why"},
            {"from": "gpt", "value": " red\n"},
        ],
    }
    ids, labels = _flat(llava_record(row, 0, Path(), "v1"))
    letters = Letters().encode
    head = letters(V1_SYSTEM + " USER: is ")
    middle, end = letters(" like "), letters("? ASSISTANT:")
    first = [BOS, *head, IMAGE, IMAGE, *middle, IMAGE, IMAGE, *end]
    second = letters("USER: why ASSISTANT:")
    assert ids == [*first, *letters("no"), EOS, *second, *letters(" red\n"), EOS]
    said = [*letters("no"), EOS, *[IGNORE] * len(second), *letters(" red\n"), EOS]
    assert labels == [IGNORE] * len(first) + said


def test_a_plain_caption_is_as_upstream_writes_it() -> None:
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a cat"}]}
    ids, labels = _flat(llava_record(row, 0, Path(), "plain"))
    caption = Letters().encode("a cat\n")
    assert (ids, labels) == ([BOS, IMAGE, IMAGE, *caption], [IGNORE] * 3 + caption)


def test_a_length_counts_every_vision_token() -> None:
    record = Record("r", ("a", "b"), (("<image><image>", "x"),), "v1", sequential=True)
    encoder = Encoder(Letters(), BOS, EOS, IMAGE, 144, 10)  # measured beyond the context, too
    assert encoder.length(record) == 1 + 288 + len(f"{V1_SYSTEM} USER:  ASSISTANT:x") + 1


# SHA-256 of batches of the built-in default; another value means that another student is trained.
DEFAULT_BATCHES = {
    scene_captions: "59f5cbabee16124060fa59cbd6e730f33b2e09db0d1b2d2240a3a76f56bc62fd",
    scene_conversations: "450b11ab17860b168dcf9e604a3d15da75310e964d0d611c02bc4d3a7aae4644",
}


@pytest.mark.parametrize("records", DEFAULT_BATCHES)
def test_the_default_batches_stay_bit_for_bit(tmp_path: Path, records: Any) -> None:
    folder = train_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image = tokenizer.convert_tokens_to_ids("<image>")
    encoder = Encoder(Tokenizer(folder / "tokenizer.json"), BOS, EOS, image, 144, 512)
    digest = hashlib.sha256()
    for start in (0, 7, 1000):
        batch = collate([encoder.row(records(0, 2000)[(start + 3 * index) % 2000]) for index in range(4)])
        for name in ("input_ids", "labels", "position_ids", "segments", "attention_mask"):
            tensor = batch[name]
            digest.update(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == DEFAULT_BATCHES[records]
