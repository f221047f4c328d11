"""The student's own answers are what it says when asked token by token; the term that compares them has a gradient."""

import pytest
import torch
from torch import Tensor

from distill.config import DistillConfig
from distill.dense_attention import decoder_inputs
from distill.merge import merge_vision, project
from distill.model import AlignKD
from distill.on_policy import own_answers
from distill.teacher.live import Teacher
from distill.teacher.signals import Batch
from tests.tiny import random_model
from vlm.data.collator import IGNORE, Row, collate
from vlm.errors import UserError

IMAGE, TOKENS, END = 299, 144, 2
STAGE = {"name": "s", "data": {"kind": "scene_captions", "count": 1}, "steps": 1, "batch_size": 1, "learning_rate": 1}


def _turn(asked: list[int], said: list[int]) -> tuple[list[int], list[int]]:
    return [*asked, *said], [IGNORE] * len(asked) + said


def _batch() -> tuple[Batch, Tensor]:
    """Two rows: three questions about a picture, and a question about none beside a caption."""
    seen = Row([1, 5, *[IMAGE] * TOKENS], [_turn([20, 21], [30, 31, END]), _turn([22], [32, END]),
                                           _turn([23, 24, 25], [33, 34, 35, 36, END])], ("0",))  # fmt: skip
    text = Row([1], [_turn([26, 27], [37, END])], ())
    caption = Row([1, *[IMAGE] * TOKENS], [([40, 41, 42, END], [40, 41, 42, END])], ("1",))
    inputs = collate([seen, text, caption], [1, 2])
    features = torch.randn(2, 576, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, positions, segments, mask = (inputs[k] for k in ("input_ids", "position_ids", "segments", "attention_mask"))
    assert ids is not None and positions is not None and segments is not None and inputs["labels"] is not None
    keys = [("s", 0), ("s", 1), ("s", 2)]
    return Batch(ids, positions, segments, mask, ["0", "1"], features, keys, inputs["records"]), inputs["labels"]


def _module(**terms: object) -> AlignKD:
    tree = {"teacher": "here", "student": "here", "stages": [STAGE], **terms}
    student = random_model(300, IMAGE, seed=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    teacher = Teacher(
        random_model(300, IMAGE, seed=2, hidden_size=48, num_attention_heads=3, num_key_value_heads=3).double()
    )
    features = _batch()[0].features
    config = DistillConfig.parse(tree, "test")
    return AlignKD(student, teacher, config, lambda images, *_: features[: len(images)]).double()


def _said(module: AlignKD, temperature: float, seed: int = 0) -> tuple[Batch, Tensor]:
    batch, labels = _batch()
    tokens = project(module.student, batch.features)
    return own_answers(module.student, batch, labels, tokens, temperature, torch.Generator().manual_seed(seed))


def test_the_likeliest_answers_are_those_of_the_whole_sequence() -> None:
    module = _module()
    batch, labels = _batch()
    found, wanted = _said(module, temperature=0)
    tokens = project(module.student, batch.features)
    states = module.student.model.language_model(
        **decoder_inputs(found, merge_vision(module.student, found.input_ids, tokens))
    ).last_hidden_state
    chosen = module.student.lm_head(states).argmax(-1)  # [B, N]
    assert bool(wanted.any()) and not bool((wanted & (labels == IGNORE)).any())
    assert torch.equal(chosen[wanted], found.input_ids.roll(-1, 1)[wanted])
    unchanged = ~wanted.roll(1, 1)
    assert torch.equal(found.input_ids[unchanged], batch.input_ids[unchanged])


def test_an_answer_stops_behind_the_token_that_ends_the_datas(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (_, labels) = _module(), _batch()
    with torch.no_grad():
        module.student.lm_head.weight[END] = 0
    assert torch.equal(_said(module, temperature=0)[1], labels != IGNORE)  # nobody ends before the data's length
    monkeypatch.setattr(module.student.lm_head, "forward", lambda x: torch.eye(300)[END].expand(len(x), -1))
    found, wanted = _said(module, temperature=0)
    starts = (labels != IGNORE) & ~torch.cat([labels.new_ones(2, 1) < 0, labels[:, :-1] != IGNORE], 1)
    assert torch.equal(wanted, starts) and set(found.input_ids.roll(-1, 1)[wanted].tolist()) == {END}


def test_the_same_step_draws_the_same_answers() -> None:
    module = _module()
    one, same, other = (_said(module, 1.0, seed)[0].input_ids for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_term_compares_the_students_answers_and_reaches_the_student() -> None:
    batch, labels = _batch()
    values = {}
    for share in (None, 1e-9, 1.0):
        logits = {"distance": "jsd", "on_policy": share and {"share": share, "temperature": 0.0}}
        module = _module(logits=logits, vision_logits={})
        outputs = module(
            batch.input_ids, labels, batch.position_ids, batch.segments, batch.images, batch.keys, batch.visible,
            batch.records,
        )  # fmt: skip
        values[share] = outputs["terms"]["logits"]
        gradients = torch.autograd.grad(values[share], module.student_parameters(), allow_unused=True)
        assert any(g is not None and bool(g.any()) for g in gradients)
    assert values[1e-9] == values[None] != values[1.0]


def test_what_cannot_be_sampled_is_refused() -> None:
    tree = {"teacher": "t", "student": "s", "stages": [STAGE], "logits": {"on_policy": {}}, "processes": 2}
    with pytest.raises(UserError, match="on_policy does not work with processes above 1 and gradient_checkpointing"):
        DistillConfig.parse({**tree, "gradient_checkpointing": True}, "test")
