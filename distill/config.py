"""Configuration of distillation: models, data, the terms of the loss (distill/terms.py), and the stages."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.data.config import Data
from distill.options import Cache, Lora, Zero
from distill.terms import AttentionTerm, LogitsTerm, NotNegative, SwitchTerm, Term, VisionLogitsTerm, VisionTerm
from vlm.config import Config, Count, Index, Positive

TERMS = ("attention", "vision_tokens", "logits", "vision_logits", "switch")
Beta = Annotated[float, Field(ge=0, lt=1)]


class Stage(Config):
    """One training stage: data, length and learning rates (cosine with linear warm-up).

    Attributes:
        steps, epochs: length in optimiser steps, or in passes over the data.
        batch_size: records (or packed rows) of one optimiser step, over all processes.
        gradient_accumulation: parts in which each process goes through its share of a batch.
        projector_learning_rate: of projector and adapters; None: as learning_rate.
        warmup: share of the steps.
    """

    name: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9_-]*$")  # names files
    data: Data
    steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count
    gradient_accumulation: Count = 1
    learning_rate: Positive
    projector_learning_rate: Positive | None = None
    warmup: float = Field(0.03, ge=0, le=1)

    @model_validator(mode="after")
    def _one_length(self) -> "Stage":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("a stage's length is either `steps` or `epochs`: give one of them")
        return self

    def per_process(self, processes: int) -> int:
        """Records that each of some processes has in memory at a time."""
        return self.batch_size // (processes * self.gradient_accumulation)


class Student(Config):
    """Sizes of a student that starts from random weights.

    Attributes:
        projector: upstream's name of what makes vision tokens of patches: MobileVLM's LDPv2 and LDP, LLaVA's MLP.
        initializer_range: None means 1 / sqrt(hidden_size).
    """

    projector: Literal["ldpnetv2", "ldpnet", "mlp2x_gelu"] = "ldpnetv2"
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    max_position_embeddings: Count = 512
    initializer_range: Positive | None = None


class DistillConfig(Config):
    """A distillation run; without teacher and terms it is plain supervised training.

    Attributes:
        teacher: checkpoint folder of the teacher.
        vision: folder whose vision tower (and tokenizer) the student takes over, frozen; None: the teacher's.
        student: sizes for random weights, or a checkpoint folder to start from.
        train_adapters: train P_attn, P_V and P_switch with the student; False leaves them random, as the authors' code.
        stop_dead_terms: end the run when a term's gradient stays zero or its value collapses (training/balance.py).
        undistilled: also train the same student without teacher, from the same weights, on the same batches.
        cache: keep the teacher's outputs in files and train without the teacher.
        teacher_bits: hold the teacher in 8 or 4 bit (bitsandbytes, on a GPU).
        lora: train low-rank updates of the decoder instead of its weights.
        processes: on this machine, one a GPU; launcher: what starts them.
        zero: DeepSpeed's ZeRO; None: every process holds everything.
        precision: of the computation; the weights stay in float32, with ZeRO on a GPU only in the optimizer.
        gradient_checkpointing: compute the decoder's layers again in the backward pass instead of keeping them.
        data_workers: processes that open and prepare images, for each training process.
        tensorboard: write events into the student's folder.
    """

    teacher: str | None = None
    vision: str | None = None
    student: Student | str
    stages: list[Stage] = Field(min_length=1)
    attention: AttentionTerm | None = None
    vision_tokens: VisionTerm | None = None
    logits: LogitsTerm | None = None
    vision_logits: VisionLogitsTerm | None = None
    switch: SwitchTerm | None = None
    train_adapters: bool = True
    undistilled: bool = False
    cache: Cache | None = None
    teacher_bits: Literal[4, 8] | None = None
    lora: Lora | None = None
    processes: Count = 1
    launcher: Literal["torch", "deepspeed"] = "torch"
    zero: Zero | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = False
    data_workers: Index = 0
    tensorboard: bool = False
    seed: Index = 0
    threads: Count = 1
    weight_decay: NotNegative = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    max_grad_norm: Positive = 1.0
    probe_steps: Count = 50
    stop_dead_terms: bool = True
    checkpoint_steps: Count = 200
    log_steps: Count = 25

    @property
    def terms(self) -> dict[str, Term]:
        """The terms of the loss beside the cross-entropy, all of which read the teacher, by their short names."""
        values: list[Term | None] = [getattr(self, key) for key in TERMS]
        named = zip(("attention", "vision", "logits", "vision_logits", "switch"), values, strict=True)
        return {name: term for name, term in named if term is not None}

    @property
    def speaks(self) -> bool:
        """Whether a term compares distributions over the next token."""
        return any(term is not None for term in (self.logits, self.vision_logits, self.switch))

    @property
    def reads_teacher(self) -> bool:
        """Whether there is such a term."""
        return bool(self.terms)

    @model_validator(mode="after")
    def _needs_teacher(self) -> "DistillConfig":
        if self.teacher is None and self.reads_teacher:
            raise ValueError(f"the terms {', '.join(TERMS)} need a `teacher`")
        if self.teacher is None and self.vision is None and not isinstance(self.student, str):
            raise ValueError("a student from random weights needs `vision` or `teacher` to take the vision tower from")
        return self

    @model_validator(mode="after")
    def _cache_holds_the_terms(self) -> "DistillConfig":
        if self.cache is None:
            return self
        if not self.reads_teacher:
            raise ValueError("cache: no term of the loss reads the teacher: leave it out")
        if self.cache.kind == "compact" and (self.attention or self.vision_tokens or self.vision_logits):
            raise ValueError(
                "cache: kind compact holds answers only: choose kind exact, or leave out attention, vision_tokens and "
                "vision_logits"
            )
        if self.switch:
            raise ValueError("cache: switch asks the teacher while it trains: leave out the cache, or switch")
        if self.attention and self.attention.block == "vision_text":
            raise ValueError("cache: attention.block vision_text is zero everywhere: leave out the cache")
        return self

    @model_validator(mode="after")
    def _can_sample(self) -> "DistillConfig":
        if self.logits is None or self.logits.on_policy is None:
            return self
        cannot = {
            "cache": self.cache is not None,
            "processes above 1": self.processes > 1,
            "zero": self.zero is not None,
            "gradient_checkpointing": self.gradient_checkpointing,
            "gradient_accumulation above 1": any(stage.gradient_accumulation > 1 for stage in self.stages),
            "data of kind llava": any(stage.data.kind == "llava" for stage in self.stages),
            "logits.tokens: all": self.logits.tokens == "all",
        }
        if found := [name for name, there in cannot.items() if there]:
            raise ValueError(f"logits.on_policy does not work with {' and '.join(found)}: leave out one of them")
        return self

    @model_validator(mode="after")
    def _whole_teacher(self) -> "DistillConfig":
        if self.switch and self.teacher_bits:
            raise ValueError("teacher_bits: switch needs gradients through the teacher: leave out one of them")
        return self

    @model_validator(mode="after")
    def _distinct_stages(self) -> "DistillConfig":
        names = [stage.name.lower() for stage in self.stages]  # lower: not every file system tells A from a
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are named {doubled[0]!r}: give each stage a name of its own")
        return self

    def without_distillation(self) -> "DistillConfig":
        """The same run with every distillation term off."""
        off = {**dict.fromkeys(TERMS), "undistilled": False, "cache": None}
        return self.model_copy(update=off)
