"""From a configuration to what is trained: the student, the teacher it fits to, and the encoder of its records."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPVisionModel, LlavaForConditionalGeneration

from distill.config import DistillConfig
from distill.features import TowerFeatures
from distill.model import AlignKD
from distill.pair import Facts, check_cached_tower, check_facts, check_towers, facts_of
from distill.teacher.cache import MANIFEST, CachedTeacher
from distill.teacher.cache_key import open_cache
from distill.teacher.live import Teacher
from distill.teacher.signals import TeacherSignals
from distill.training.lora import add_lora
from vlm.data.collator import Encoder
from vlm.errors import UserError, install_hint
from vlm.manifest import Preprocessing
from vlm.models.checkpoint import Checkpoint, load_checkpoint
from vlm.models.upstream import FAMILIES
from vlm.tokenizer import Tokenizer

FEATURES_KEPT = 8192  # images whose tower features stay in memory: 74 KB each at 576 patches of 64 numbers
# Layers that stay as they are in a quantized teacher: their outputs or weights are read as they are.
UNQUANTIZED = ["vision_tower", "multi_modal_projector", "lm_head"]


def build(config: DistillConfig, signals: TeacherSignals | None = None) -> tuple[AlignKD, Path, Encoder]:
    """Build module, tokenizer folder and encoder from a configuration.

    Args:
        config: the run.
        signals: the teacher, if it is there already.
    Raises:
        UserError: teacher and student do not fit together, a layer whose attention is wanted does not exist, or the
            cache of the teacher's outputs was made for something else.
    """
    torch.manual_seed(config.seed)
    sized = not isinstance(config.student, str)
    cached = config.cache is not None and (Path(config.cache.folder) / MANIFEST).is_file()
    teacher = None
    if config.teacher and (sized or (config.reads_teacher and not (signals or cached))):
        teacher = load_teacher(config)
    student, tokenizer_folder, preprocessing = build_student(config, teacher)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    max_length: int = student.config.text_config.max_position_embeddings
    if signals is None and config.cache is not None and cached:
        signals = open_cache(config, max_length, preprocessing)
    if teacher:
        theirs = facts_of(teacher.model, AutoTokenizer.from_pretrained(teacher.folder))
        check_facts(config, theirs, facts_of(student, tokenizer))
        check_towers(config, teacher.model, student)
    if isinstance(signals, CachedTeacher):
        check_facts(config, Facts(**signals.manifest["facts"]), facts_of(student, tokenizer))
        check_cached_tower(config, signals, student)
    if signals is None and teacher and config.reads_teacher:
        signals = Teacher(teacher.model)
    prepare(config, student)
    encoder = Encoder(
        tokenizer=Tokenizer(tokenizer_folder / "tokenizer.json"),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        image_token_id=student.config.image_token_id,
        image_tokens=student.config.image_seq_length,
        max_length=max_length,
    )
    tower = TowerFeatures(student, preprocessing, FEATURES_KEPT)
    return AlignKD(student, signals, config, tower), tokenizer_folder, encoder


def build_student(
    config: DistillConfig, teacher: Checkpoint | None
) -> tuple[LlavaForConditionalGeneration, Path, Preprocessing]:
    """The student, its vision tower taken over, its decoder random unless a checkpoint is given; the folder of its
    tokenizer; and how its pictures are prepared (as its checkpoint, else the teacher's says; else as CLIP does)."""
    if isinstance(config.student, str):
        checkpoint = load_checkpoint(Path(config.student))
        return checkpoint.model, checkpoint.folder, checkpoint.preprocessing
    if config.vision:
        folder = Path(config.vision)
        tower = CLIPVisionModel.from_pretrained(folder)
    else:
        assert teacher is not None  # guaranteed by DistillConfig
        folder, tower = teacher.folder, teacher.model.model.vision_tower
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # A teacher's embeddings may have rows beyond its tokenizer's; its logits are over all of them.
    vocabulary = teacher.model.config.text_config.vocab_size if teacher else len(tokenizer)
    sizes = config.student.model_dump()
    family = FAMILIES[sizes.pop("projector")]
    spread = sizes.pop("initializer_range") or sizes["hidden_size"] ** -0.5
    text = {**sizes, "initializer_range": spread, "vocab_size": vocabulary, "pad_token_id": None}
    vision = tower.config.to_dict()
    torch.manual_seed(config.seed)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    student = family.model(family.config(vision, text, image_token_id))
    student.model.vision_tower.load_state_dict(tower.state_dict())
    preprocessing = teacher.preprocessing if teacher else Preprocessing(size=tower.config.image_size)
    return student, folder, preprocessing


def load_teacher(config: DistillConfig) -> Checkpoint:
    """The teacher; on a GPU in the run's precision, or in 8 or 4 bit.

    Raises:
        UserError: it cannot be loaded, or not in so few bits here.
    """
    folder, dtype = Path(config.teacher or ""), computing_dtype(config)
    if config.teacher_bits is None:
        return load_checkpoint(folder, dtype)
    if not torch.cuda.is_available():
        raise UserError(f"teacher_bits: {config.teacher_bits} found, but this machine has no GPU. Leave it out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"teacher_bits: {config.teacher_bits} needs bitsandbytes, which is not installed: "
            f"{install_hint('quantized')}"
        )
    from transformers import BitsAndBytesConfig

    four = config.teacher_bits == 4
    settings = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=UNQUANTIZED,
    )
    return load_checkpoint(folder, dtype, settings)


def computing_device() -> torch.device:
    """This process's GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def computing_dtype(config: DistillConfig) -> torch.dtype:
    """What the frozen teacher and vision tower are held in: on a GPU the run's precision, else float32."""
    if not torch.cuda.is_available():
        return torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]


def prepare(config: DistillConfig, student: LlavaForConditionalGeneration) -> None:
    """Set what trains and what is kept of the student's decoder.

    Raises:
        UserError: the precision or LoRA is not possible here.
    """
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision: fp16 found, but this machine has no GPU. Choose bf16 or fp32.")
    if config.lora:
        add_lora(student, config.lora)
    if config.gradient_checkpointing:
        student.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
