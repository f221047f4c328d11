"""Whether a teacher and a student fit together: one vision tower and one tokenizer serve both."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import LlavaForConditionalGeneration

from distill.config import DistillConfig
from distill.features import tower_probe
from distill.teacher.cache import CachedTeacher
from vlm.errors import UserError

SAME = 0.005  # relative difference of weights or features; of a tower in bfloat16 from its original it is 0.002


@dataclass(frozen=True)
class Facts:
    """What teacher and student must have in common, and how many layers there are to read."""

    shared: dict[str, int]
    vocabulary: dict[str, int]
    layers: int


def facts_of(model: LlavaForConditionalGeneration, tokenizer: Any) -> Facts:
    """Of a model and its tokenizer."""
    config = model.config
    shared = {
        "image size": config.vision_config.image_size,
        "patch size": config.vision_config.patch_size,
        "width of the vision tower": config.vision_config.hidden_size,
        "feature layer of the vision tower": config.vision_feature_layer,
        "number of image tokens": config.image_seq_length,
        "image token id": config.image_token_id,
        "vocabulary size": config.text_config.vocab_size,
    }
    return Facts(shared, tokenizer.get_vocab(), config.text_config.num_hidden_layers)


def check_facts(config: DistillConfig, theirs: Facts, ours: Facts) -> None:
    """See that sizes and tokenizers agree and that the layers that are read exist.

    Raises:
        UserError: names both values and what to do.
    """
    for what, value in theirs.shared.items():
        if value != ours.shared[what]:
            raise _unlike(config, what, value, ours.shared[what])
    known, own = theirs.vocabulary, ours.vocabulary
    for token in sorted(known.keys() | own.keys()):
        if known.get(token) != own.get(token):
            raise _unlike(config, f"the id of the token {token!r}", known.get(token), own.get(token))
    if config.attention:
        for key, count in (("teacher_layers", theirs.layers), ("student_layers", ours.layers)):
            for layer in getattr(config.attention, key):
                if not -count <= layer < count:
                    raise UserError(
                        f"attention.{key}: {layer} found, but that decoder has {count} layers. "
                        f"Give numbers from 0 to {count - 1}, or from -1, the last, to -{count}."
                    )


def check_towers(
    config: DistillConfig, teacher: LlavaForConditionalGeneration, student: LlavaForConditionalGeneration
) -> None:
    """See that the weights of both vision towers are the same, up to the rounding of the type they are held in."""
    theirs, ours = (dict(model.model.vision_tower.named_parameters()) for model in (teacher, student))
    for name in theirs.keys() | ours.keys():
        if name not in theirs or name not in ours:
            raise _unlike(config, f"the vision tower's {name}", *(_there(name in tower) for tower in (theirs, ours)))
        distance = _distance(theirs[name], ours[name])
        if distance > SAME:
            raise _unlike(config, f"the vision tower's {name}", f"{distance:.1%} away from that", "another one")


def check_cached_tower(config: DistillConfig, teacher: CachedTeacher, student: LlavaForConditionalGeneration) -> None:
    """See that the student's tower gives the features that the cached teacher's outputs came from."""
    distance = _distance(teacher.probe, tower_probe(student))
    if distance > SAME:
        raise _unlike(config, "the vision tower", f"{distance:.1%} away in its features from that", "another one")


def _distance(theirs: Tensor, ours: Tensor) -> float:
    if theirs.shape != ours.shape:
        return 1.0
    a, b = theirs.detach().float().cpu(), ours.detach().float().cpu()
    return float((a - b).norm() / a.norm().clamp(min=1e-12))


def _there(found: bool) -> str:
    return "there" if found else "missing"


def _unlike(config: DistillConfig, what: str, theirs: object, ours: object) -> UserError:
    student = config.student if isinstance(config.student, str) else f"the student on {config.vision or config.teacher}"
    return UserError(
        f"{config.teacher} and {student} do not fit together: {what} is {theirs} of the teacher and {ours} of the "
        "student. They share one vision tower and one tokenizer: choose a teacher and a student of the same family, or "
        "give sizes as `student` and leave out `vision`, so that it takes over the teacher's."
    )
