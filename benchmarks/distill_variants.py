"""What `benchmarks.distill_step` compares: models with random weights, a batch, and three ways to make a step of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from distill.config import DistillConfig
from distill.features import TowerFeatures
from distill.losses.answers import CHUNK
from distill.merge import merge_vision, project
from distill.model import AlignKD
from distill.teacher.live import Teacher
from distill.teacher.signals import Batch
from vlm.data.collator import IGNORE
from vlm.models.mobilevlm import MobileVlmForConditionalGeneration, mobilevlm_config, published_config

IMAGE_TOKENS, BEFORE_IMAGE = 144, 35  # the image starts at 35 under the v1 template
VOCABULARY = 32000

SMALL = {
    "vision": {"image_size": 96, "patch_size": 4, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
               "num_attention_heads": 2},
    "teacher": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 14, "num_attention_heads": 10},
    "student": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 10, "num_attention_heads": 8},
}  # fmt: skip
PUBLISHED = {"teacher": "no folder: built here", "attention": {}, "vision_tokens": {}, "logits": {}}
STAGE = {
    "name": "s",
    "data": {"kind": "scene_captions", "count": 1},
    "steps": 1,
    "batch_size": 1,
    "learning_rate": 1e-4,
}
Step = Callable[[], object]


class Given(TowerFeatures):
    """Features that are there already."""

    def __init__(self, features: Tensor) -> None:
        self.given = features

    def __call__(self, images: list[str], pixels: Tensor | None = None) -> Tensor:
        """All of them."""
        return self.given


@dataclass(frozen=True)
class Models:
    """Teacher and student with random weights, and the released formulation's free adapters."""

    teacher: LlavaForConditionalGeneration
    student: LlavaForConditionalGeneration
    head_map: Tensor
    vision_map: Tensor


def build(size: str, device: str) -> Models:
    """Both models of a size on a device, bfloat16 on a GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    models = []
    with torch.device(device):
        for role, published in (("teacher", "7b"), ("student", "1.7b")):
            if size == "7b":
                config = published_config(published)
            else:
                text = {**SMALL[role], "vocab_size": VOCABULARY + 1, "max_position_embeddings": 4096}
                text["num_key_value_heads"] = text["num_attention_heads"]
                config = mobilevlm_config(SMALL["vision"], text, VOCABULARY)
            models.append(MobileVlmForConditionalGeneration(config))
        teacher, student = models
        theirs, ours = teacher.config.text_config, student.config.text_config
        head_map = torch.randn(ours.num_attention_heads, theirs.num_attention_heads) / theirs.num_attention_heads
        vision_map = torch.randn(ours.hidden_size, theirs.hidden_size) / theirs.hidden_size
    torch.set_default_dtype(torch.float32)
    return Models(teacher, student.train(), head_map, vision_map)


def make_batch(models: Models, rows: int, length: int) -> tuple[Batch, Tensor]:
    """A batch of single-turn rows with an image, and its labels, on the predicting positions."""
    config, device = models.student.config, models.student.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.roll(-1, dims=1)
    ids[:, BEFORE_IMAGE : BEFORE_IMAGE + IMAGE_TOKENS] = config.image_token_id
    labels[:, : length - (length - IMAGE_TOKENS) // 2] = IGNORE
    labels[:, -1] = IGNORE
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    features = torch.randn(rows, patches, config.vision_config.hidden_size, generator=generator)
    positions = torch.arange(length).expand(rows, -1)
    images, keys = [str(row) for row in range(rows)], [("s", row) for row in range(rows)]
    ids, positions, labels = (x.to(device) for x in (ids, positions, labels))
    return Batch(ids, positions, torch.ones_like(ids), None, images, features.to(device), keys), labels


def with_optimizer(module: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """A step: gradients kept allocated, so that memory beyond them is the activations'."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)  # the weights stay as they are

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss().backward()
        optimizer.step()

    return step


def ours(models: Models, batch: Batch, labels: Tensor) -> Step:
    """(a)"""
    module = _module(models, batch, Teacher(models.teacher, keep=0), PUBLISHED)
    return with_optimizer(module, lambda: _loss(module, batch, labels))


def bound(models: Models, batch: Batch, labels: Tensor) -> Step:
    """(c)"""
    module, teacher = _module(models, batch, None, {"vision": "built here"}), Teacher(models.teacher, keep=0)
    wanted, rows = labels != IGNORE, CHUNK[models.student.device.type] // VOCABULARY

    def loss() -> Tensor:
        with torch.no_grad():
            answers = teacher.answers(batch, wanted)
            for part in answers.states.split(rows):
                answers.head(part)
        return _loss(module, batch, labels)

    return with_optimizer(module, loss)


def _module(models: Models, batch: Batch, teacher: Teacher | None, recipe: dict) -> AlignKD:
    config = DistillConfig.parse({"student": "built here", "stages": [STAGE], **recipe}, "benchmark")
    module = AlignKD(models.student, teacher, config, Given(batch.features))
    return module.to(models.student.device, models.student.dtype).train()


def _loss(module: AlignKD, batch: Batch, labels: Tensor) -> Tensor:
    loss: Tensor = module(
        batch.input_ids, labels, batch.position_ids, batch.segments, batch.images, batch.keys, attention_mask=None
    )["loss"]
    return loss


def released(models: Models, batch: Batch, labels: Tensor) -> Step:
    """(b)"""
    length = labels.shape[1]
    is_vision = batch.input_ids == models.student.config.image_token_id  # [B, N]
    mask = (~is_vision[:, :, None] & is_vision[:, None, :])[:, None]  # [B, 1, N, N], text queries x vision keys
    causal = torch.full((length, length), -1e9, device=labels.device).triu(1)[None, None]

    def run(model: LlavaForConditionalGeneration) -> tuple[Tensor, Tensor, Tensor]:
        model.model.language_model.set_attn_implementation("eager")
        tokens = project(model, batch.features)  # [I, V, D]
        embeds = merge_vision(model, batch.input_ids, tokens)  # [B, N, D]
        additive = causal.to(embeds.dtype).expand(len(embeds), -1, -1, -1)
        found = model.model.language_model(
            inputs_embeds=embeds, attention_mask=additive, position_ids=batch.position_ids, use_cache=False,
            output_attentions=True,
        )  # fmt: skip
        logits = model.lm_head(found.last_hidden_state)  # [B, N, vocabulary]
        kept.append(found.attentions)
        return tokens, found.attentions[0], logits

    kept: list[tuple[Tensor, ...]] = []

    def loss() -> Tensor:
        kept.clear()
        with torch.no_grad():
            their_tokens, theirs, their_logits = run(models.teacher)
        tokens, attention, logits = run(models.student)
        supervised = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        mapped = torch.einsum("sh,bhmn->bsmn", models.head_map, theirs)  # [B, H_S, N, N]
        first = F.mse_loss(mapped * mask, attention * mask)
        vision = F.mse_loss(F.linear(their_tokens, models.vision_map), tokens)
        log_q, p = logits.log_softmax(-1), their_logits.softmax(-1)
        return supervised + first + vision + F.kl_div(log_q, p, reduction="batchmean") / length

    return with_optimizer(models.student, loss)


VARIANTS = {"a": ours, "b": released, "c": bound}


def prepare(name: str, models: Models, batch: Batch, labels: Tensor) -> Step:
    """A variant's step, with the attention it runs with."""
    step = VARIANTS[name](models, batch, labels)

    def fused() -> object:
        if name != "b":
            for model in (models.teacher, models.student):
                model.model.language_model.set_attn_implementation("sdpa")
        return step()

    return fused
