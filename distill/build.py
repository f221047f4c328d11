"""From a configuration to what is trained: the student, the teacher it fits to, and the encoder of its records."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPVisionModel, LlavaForConditionalGeneration

from distill.config import DistillConfig
from distill.features import TowerFeatures
from distill.model import AlignKD
from distill.teacher import Teacher
from vlm.data.collator import Encoder
from vlm.errors import UserError
from vlm.manifest import Preprocessing
from vlm.models.checkpoint import Checkpoint, load_checkpoint
from vlm.models.mobilevlm import MobileVlmForConditionalGeneration, mobilevlm_config
from vlm.tokenizer import Tokenizer

FEATURES_KEPT = 8192  # images whose tower features stay in memory: 74 KB each at 576 patches of 64 numbers


def build(config: DistillConfig) -> tuple[AlignKD, Path, Encoder]:
    """Build module, tokenizer folder and encoder from a configuration.

    Raises:
        UserError: teacher and student do not fit together, or a layer whose attention is wanted does not exist.
    """
    teacher = load_checkpoint(Path(config.teacher)) if config.teacher else None
    student, tokenizer_folder, preprocessing = build_student(config, teacher)
    if teacher:
        check_pair(config, teacher, student, tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    encoder = Encoder(
        tokenizer=Tokenizer(tokenizer_folder / "tokenizer.json"),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        image_token_id=student.config.image_token_id,
        image_tokens=student.config.image_seq_length,
        max_length=student.config.text_config.max_position_embeddings,
    )
    tower = TowerFeatures(student, preprocessing, FEATURES_KEPT)
    return AlignKD(student, Teacher(teacher.model) if teacher else None, config, tower), tokenizer_folder, encoder


def build_student(
    config: DistillConfig, teacher: Checkpoint | None
) -> tuple[LlavaForConditionalGeneration, Path, Preprocessing]:
    """The student, its vision tower taken over, its decoder random unless a checkpoint is given; the folder of its
    tokenizer; and how its pictures are prepared (as its checkpoint, else the teacher's says; else as CLIP does)."""
    if isinstance(config.student, str):
        checkpoint = load_checkpoint(Path(config.student))
        return checkpoint.model, checkpoint.folder, checkpoint.preprocessing
    folder = Path(config.vision or config.teacher or "")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if config.vision:
        tower = CLIPVisionModel.from_pretrained(folder)
    else:
        assert teacher is not None  # guaranteed by DistillConfig
        tower = teacher.model.model.vision_tower
    # A teacher's embeddings may have rows beyond its tokenizer's; its logits are over all of them.
    vocabulary = teacher.model.config.text_config.vocab_size if teacher else len(tokenizer)
    sizes = config.student.model_dump()
    spread = sizes.pop("initializer_range") or sizes["hidden_size"] ** -0.5
    text = {**sizes, "initializer_range": spread, "vocab_size": vocabulary, "pad_token_id": None}
    vision = tower.config.to_dict()
    torch.manual_seed(config.seed)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    student = MobileVlmForConditionalGeneration(mobilevlm_config(vision, text, image_token_id))
    student.model.vision_tower.load_state_dict(tower.state_dict())
    preprocessing = teacher.preprocessing if teacher else Preprocessing(size=tower.config.image_size)
    return student, folder, preprocessing


def check_pair(
    config: DistillConfig, teacher: Checkpoint, student: LlavaForConditionalGeneration, tokenizer_folder: Path
) -> None:
    """See that one tower and one tokenizer serve teacher and student, and that the layers that are read exist.

    Raises:
        UserError: names both values and what to do.
    """
    theirs, ours = _shared(teacher.model), _shared(student)
    for what in theirs:
        if theirs[what] != ours[what]:
            raise _unlike(config, what, theirs[what], ours[what])
    known, own = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (teacher.folder, tokenizer_folder))
    for token in sorted(known.keys() | own.keys()):
        if known.get(token) != own.get(token):
            raise _unlike(config, f"the id of the token {token!r}", known.get(token), own.get(token))
    if config.attention:
        for key, model in (("teacher_layers", teacher.model), ("student_layers", student)):
            count = model.config.text_config.num_hidden_layers
            for layer in getattr(config.attention, key):
                if not -count <= layer < count:
                    raise UserError(
                        f"attention.{key}: {layer} found, but that decoder has {count} layers. "
                        f"Give numbers from 0 to {count - 1}, or from -1, the last, to -{count}."
                    )


def _shared(model: LlavaForConditionalGeneration) -> dict[str, int]:
    """What teacher and student must have in common."""
    config = model.config
    return {
        "image size": config.vision_config.image_size,
        "patch size": config.vision_config.patch_size,
        "width of the vision tower": config.vision_config.hidden_size,
        "feature layer of the vision tower": config.vision_feature_layer,
        "number of image tokens": config.image_seq_length,
        "image token id": config.image_token_id,
        "vocabulary size": config.text_config.vocab_size,
    }


def _unlike(config: DistillConfig, what: str, theirs: object, ours: object) -> UserError:
    student = config.student if isinstance(config.student, str) else f"the student on {config.vision or config.teacher}"
    return UserError(
        f"{config.teacher} and {student} do not fit together: {what} is {theirs} of the teacher and {ours} of the "
        "student. They share one vision tower and one tokenizer: choose a teacher and a student of the same family, or "
        "give sizes as `student` and leave out `vision`, so that it takes over the teacher's."
    )
