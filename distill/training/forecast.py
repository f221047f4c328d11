"""What training will need of each GPU's memory, said before it starts, against what is there."""

from dataclasses import dataclass

import torch
from transformers import LlavaForConditionalGeneration

from distill.config import DistillConfig, Stage
from distill.losses.answers import CHUNK
from distill.training.processes import Processes
from vlm.errors import UserError
from vlm.machine import available_memory

GIB = 2**30
LOGITS = 6 * 4  # bytes for each of a chunk of logits: both models', their distance, gradients
TEACHER_BYTES = {None: 2.0, 8: 1.0, 4: 0.6}  # per weight; 4 bit with its scales


@dataclass(frozen=True)
class Forecast:
    """Bytes that one process needs where it computes (`parts`), and what lies there and in all (`room`)."""

    parts: dict[str, int]
    room: int

    @property
    def certain(self) -> int:
        """What is known exactly: all but the activations."""
        return sum(size for name, size in self.parts.items() if name != "activations")

    def text(self) -> str:
        """One line with every part."""
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items())
        total = sum(self.parts.values())
        return f"memory forecast, GiB per process: {parts}; in all {total / GIB:.2f} of {self.room / GIB:.2f}"

    def refuse_if_hopeless(self) -> None:
        """Stop before anything is loaded onto a GPU that cannot hold it.

        Raises:
            UserError: weights, gradients and optimizer alone exceed what is there.
        """
        if self.certain > self.room:
            raise UserError(
                f"{self.text()}: this does not fit. Use more GPUs with zero.stage 2 or 3, zero.offload, lora, "
                "teacher_bits, or a cache of the teacher's outputs (cache)."
            )


def forecast(
    config: DistillConfig, stage: Stage, student: LlavaForConditionalGeneration, teacher_parameters: int, who: Processes
) -> Forecast:
    """Forecast for one process of a stage.

    Args:
        config: the run.
        stage: the one that trains.
        student: with its trainable parameters marked.
        teacher_parameters: of the teacher, as far as it is in memory; 0 with a cache.
        who: the processes.
    """
    zero, n = config.zero, who.count
    level = zero.stage if zero else 0
    offload = zero.offload if zero else "none"
    half = config.precision != "fp32" and torch.cuda.is_available()
    tower = sum(p.numel() for p in student.model.vision_tower.parameters())
    weights = (sum(p.numel() for p in student.parameters()) - tower) * (2 if half and zero else 4)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    gradients = trained * (2 if half and zero else 4)
    optimizer = trained * (12 if half and zero else 8)  # with ZeRO the weights in float32 too
    parts = {
        "student": weights // n if level == 3 else weights,
        "gradients": gradients // n if level >= 2 else gradients,
        "optimizer": optimizer // n if level >= 1 else optimizer,
        "vision tower": tower * (2 if half else 4),
        "teacher": round(teacher_parameters * (TEACHER_BYTES[config.teacher_bits] if half else 4)),
        "activations": activations(config, stage, student, who),
    }
    if offload != "none":
        parts["optimizer"] = 0
    if offload == "all":
        parts["student"] = 0
    return Forecast(parts, memory(who))


def activations(config: DistillConfig, stage: Stage, student: LlavaForConditionalGeneration, who: Processes) -> int:
    """What the student's decoder keeps for its backward pass, for the longest batch.

    A LLaMA layer keeps about 8 tensors of its width, its keys and values, and 4 of its MLP's width for every token;
    with gradient checkpointing one such layer, and each layer's input.
    """
    text = student.config.text_config
    size = 2 if config.precision != "fp32" else 4
    length = min(stage.data.max_length or text.max_position_embeddings, text.max_position_embeddings)
    tokens = length * stage.per_process(who.count)
    kv_width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    layer = (8 * text.hidden_size + 2 * kv_width + 4 * text.intermediate_size) * size
    layers = text.num_hidden_layers
    kept = layer + layers * text.hidden_size * size if config.gradient_checkpointing else layers * layer
    chunk = min(tokens * text.vocab_size, CHUNK["cuda" if torch.cuda.is_available() else "cpu"])
    head = text.vocab_size * text.hidden_size * 4  # its gradient, summed in float32
    return tokens * kept + chunk * LOGITS + head


def memory(who: Processes) -> int:
    """Bytes where this process computes: its GPU's, or its share of what programs can still get."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(who.local).total_memory)
    free = available_memory()
    return (2**62 if free is None else free) // who.here
