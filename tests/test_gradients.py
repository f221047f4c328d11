"""In float64, each term's gradient to the student and to its adapter is not zero and equals finite differences."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from distill.config import DistillConfig, Stage
from distill.model import AlignKD
from distill.teacher.live import Teacher
from distill.training.trainer import LEARNED_RATE, parameter_groups
from tests.tiny import random_model
from vlm.data.collator import IGNORE, segment_mask

IMAGE, TOKENS = 299, 144
STEP = 1e-5
Batch = dict[str, Any]

PLAIN = [[1], "image", [20, 21, 22, 2]]
V1 = [[1, *range(5, 20)], "image", [30, 31, 32], [40, 41, 2]]
V1_SHORT = [[1, *range(5, 20)], "image", [30], [41, 2]]
TWO = [[1, 5, 6], "image", [7], "image", [30, 31], [40, 2]]
TEXT = [[1, *range(5, 20), 30, 31], [40, 41, 42, 2]]


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norm rounds to float32, which finite differences would see."""

    def forward(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def _batch(samples: list[list], left: bool = False) -> Batch:
    """Samples of parts, the last one the answer, padded on one side; labels stand on the predicting position."""
    ids = [[t for part in sample for t in ([IMAGE] * TOKENS if part == "image" else part)] for sample in samples]
    longest = max(map(len, ids))
    batch = {
        "input_ids": torch.zeros(len(ids), longest, dtype=torch.long),
        "labels": torch.full((len(ids), longest), IGNORE),
        "segments": torch.full((len(ids), longest), -1),
    }
    for row, (sample, own) in enumerate(zip(samples, ids, strict=True)):
        start = longest - len(own) if left else 0
        batch["input_ids"][row, start : start + len(own)] = torch.tensor(own)
        batch["segments"][row, start : start + len(own)] = 1
        end = start + len(own) - 1
        batch["labels"][row, end - len(sample[-1]) : end] = torch.tensor(sample[-1])
    images = [f"{row}" for row, sample in enumerate(samples) for part in sample if part == "image"]
    positions = (batch["segments"] >= 0).cumsum(-1).clamp(min=1) - 1
    keys = [("s", row) for row in range(len(ids))]
    mask = segment_mask(batch["segments"])
    return {**batch, "position_ids": positions, "attention_mask": mask, "images": images, "keys": keys}


BATCHES: dict[str, Callable[[], Batch]] = {
    "plain": lambda: _batch([PLAIN]),
    "v1": lambda: _batch([V1, V1_SHORT]),
    "one text-only sample": lambda: _batch([V1, TEXT]),
    "two images": lambda: _batch([TWO, V1]),
    "padded right": lambda: _batch([V1, PLAIN]),
    "padded left": lambda: _batch([V1, PLAIN], left=True),
}
RECIPES: dict[str, dict[str, Any]] = {
    "published": {"attention": {}, "vision_tokens": {}, "logits": {}},
    "convex": {
        "attention": {"distance": "kl", "teacher_layers": [0, -1], "student_layers": [0, -1]},
        "vision_tokens": {"focus_tokens": 5, "focus_weight": 1.0, "weight": {"learned": 1.0}},
        "logits": {"distance": "jsd", "temperature": 2.0, "tokens": "all"},
    },
    "cosine": {
        "attention": {"distance": "cosine", "block": "full", "weight": {"learned": 2.0}},
        "vision_tokens": {"focus_weight": 0.0},
        "logits": {"distance": "skew_reverse_kl"},
    },
    "beyond": {
        "attention": {"distance": "cosine", "teacher_layers": [1], "student_layers": [1]},
        "vision_tokens": {"weighting": "instruction"},
        "logits": {"distance": "forward_kl"},
        "vision_logits": {"temperature": 2.0},
        "switch": {"distance": "jsd"},
    },
    "on policy": {"logits": {"distance": "jsd", "on_policy": {"share": 1.0, "temperature": 0.0}}},
}
RELEASED = {  # facts of the authors' code
    "attention": {"block": "vision_text"},
    "vision_tokens": {"focus_weight": 1.0},
    "logits": {"distance": "forward_kl", "tokens": "all"},
    "train_adapters": False,
}
FADING = {
    "vision_tokens": {"weight": {"fixed": 4 / 3, "until": 1.0}},
    "logits": {"weight": {"until": 0.5}},
}


def module(recipe: str) -> AlignKD:
    """A student of two layers, a teacher of another width, both random and in float64."""
    data = {"kind": "scene_captions", "count": 1}
    stage = {"name": "s", "data": data, "steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    tree = {
        "teacher": "here",
        "student": "here",
        "stages": [stage],
        **{**RECIPES, "fading": FADING, "released": RELEASED}[recipe],
    }
    config = DistillConfig.parse(tree, "test")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    student = random_model(300, IMAGE, seed=1, **sizes)
    teacher = random_model(300, IMAGE, seed=2, hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    features = torch.randn(3, 576, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = AlignKD(student, Teacher(teacher.double()), config, lambda images, *_: features[: len(images)])
    made.progress = 0.25  # of the run: a weight that fades until 0.5 is at half
    return made.double()


def _shift(parameters: Iterable[nn.Parameter], directions: Iterable[Tensor], size: float) -> None:
    with torch.no_grad():
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.add_(direction, alpha=size)


def _check(made: AlignKD, batch: Batch, parameters: list[nn.Parameter], names: set[str]) -> None:
    """Along a random direction in the parameters: derivative of each value by autograd and by central differences."""
    outputs = made(**batch)
    values = {**outputs["terms"], "loss": outputs["loss"]}
    torch.manual_seed(0)
    directions = [torch.randn_like(p) for p in parameters]
    slopes: dict[str, float] = {}
    for name, value in values.items():
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, directions, strict=True)
        slopes[name] = sum(float((g * d).sum()) for g, d in pairs if g is not None)
    sides = []
    for size in (STEP, -2 * STEP):
        _shift(parameters, directions, size)
        with torch.no_grad():
            found = made(**batch)
        sides.append({**found["terms"], "loss": found["loss"]})
    _shift(parameters, directions, STEP)
    for name in names:
        slope = (float(sides[0][name]) - float(sides[1][name])) / (2 * STEP)
        assert slopes[name] != 0, name
        assert slopes[name] == pytest.approx(slope, rel=1e-3), name


@pytest.mark.parametrize("batch", sorted(BATCHES))
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_gradients_equal_finite_differences(recipe: str, batch: str) -> None:
    made = module(recipe)
    inputs = BATCHES[batch]()
    _check(made, inputs, made.student_parameters(), {"sup", *made.terms, "loss"})
    for name in made.adapters.keys() & made.terms.keys():
        _check(made, inputs, list(made.adapters[name].parameters()), {name, "loss"})
    learned = [p for n, p in made.adapters.named_parameters() if n.startswith("log_weight")]
    if learned:
        _check(made, inputs, learned, {"loss"})


@pytest.mark.parametrize("recipe", ["published", "beyond"])
def test_a_batch_of_text_alone_says_nothing_of_the_image_but_reaches_every_parameter(recipe: str) -> None:
    made = module(recipe)
    outputs = made(**_batch([TEXT, TEXT]))
    assert set(outputs["silent"]) == made.terms.keys() - {"logits"}
    assert all(outputs["terms"][name] == 0 for name in outputs["silent"])
    outputs["loss"].backward()
    trained = [p for p in made.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_a_term_that_has_faded_out_is_not_computed_and_leaves_no_parameter_without_a_gradient() -> None:
    made, batch = module("fading"), BATCHES["v1"]()
    weights = {name: float(weight) for name, weight in made(**batch)["weights"].items()}
    assert weights == pytest.approx({"vision": 1.0, "logits": 0.5})
    made.progress = 0.5
    outputs = made(**batch)
    assert set(outputs["terms"]) == {"sup", "vision"}
    made.progress = 1.0
    outputs = made(**batch)
    assert set(outputs["terms"]) == {"sup"} and torch.equal(outputs["loss"], outputs["terms"]["sup"])
    outputs["loss"].backward()
    assert all(p.grad is not None for p in made.adapters.parameters())


def test_the_released_formulation_has_a_block_of_zeros_and_adapters_that_nobody_trains() -> None:
    made, batch = module("released"), BATCHES["v1"]()
    term = made(**batch)["terms"]["attention"]
    gradients = torch.autograd.grad(term, made.student_parameters(), allow_unused=True)
    assert term == 0 and not any(g is not None and bool(g.any()) for g in gradients)
    assert not any(p.requires_grad for p in made.adapters.parameters())
    assert made(**batch)["terms"]["vision"] > 0


def test_a_learned_weight_tends_to_half_its_degrees_over_the_value() -> None:
    made = module("cosine")
    outputs = made(**BATCHES["v1"]())
    value = float(outputs["terms"]["attention"].detach())
    parameter = made.adapters["log_weight_attention"].value
    with torch.no_grad():
        parameter.fill_(torch.tensor(2.0 / (2 * value)).log())
    loss = made(**BATCHES["v1"]())["loss"]
    (gradient,) = torch.autograd.grad(loss, parameter)
    assert abs(float(gradient)) < 1e-6


def test_learned_weights_have_their_own_learning_rate() -> None:
    data = {"kind": "scene_captions", "count": 1}
    stage = Stage(name="s", data=data, steps=1, batch_size=1, learning_rate=1e-4, projector_learning_rate=2e-4)
    made = module("cosine")
    student, fast, learned = parameter_groups(made, stage)
    assert (student["lr"], fast["lr"], learned["lr"]) == (1e-4, 2e-4, LEARNED_RATE)
    assert learned["params"] == [made.adapters["log_weight_attention"].value]
    grouped = [p for group in (student, fast, learned) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in made.parameters() if p.requires_grad}
    assert len(parameter_groups(module("published"), stage)) == 2


def test_gradient_checkpointing_changes_no_gradient() -> None:
    made = module("convex").train()
    batch = BATCHES["two images"]()
    made(**batch)["loss"].backward()
    expected = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    made.zero_grad()
    made.student.gradient_checkpointing_enable({"use_reentrant": False})
    made(**batch)["loss"].backward()
    found = [p.grad for p in made.parameters() if p.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
