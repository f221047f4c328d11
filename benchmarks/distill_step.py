"""Time and memory of one step of Align-KD as published: `python -m benchmarks.distill_step`.

In one process, on the same weights and batch, the three taking turns so that all meet the same load:

    (a) this implementation: attention read from the first layer, every layer fused, losses in chunks of the vocabulary
    (b) the released formulation: eager attention, all layers' attentions kept, logits of all positions of both models
    (c) the lower bound: the teacher's forward pass (answers' logits included) and the plain student's step

A step is forward, backward and AdamW. Vision features are given, the tower is not part of it. Half of a row's text is
answer. Memory is what the step's tensors take beyond weights, gradients and optimizer states ("activations"), and the
whole. On a CPU every allocation is counted by torch's profiler; on a GPU the allocator's peak is read.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import LlavaForConditionalGeneration

from distill.answers import CHUNK
from distill.config import DistillConfig
from distill.features import TowerFeatures
from distill.merge import merge_vision, project
from distill.model import AlignKD
from distill.signals import Batch
from distill.teacher import Teacher
from vlm.data.collator import IGNORE
from vlm.models.mobilevlm import MobileVlmForConditionalGeneration, mobilevlm_config, published_config

LENGTHS = (655, 2191)
IMAGE_TOKENS, BEFORE_IMAGE = 144, 35  # the image starts at 35 under the v1 template
VOCABULARY = 32000
TARGETS = {"time": 1.10, "memory": 1.05, "released": 4.0}
WARM_UP = 1
PEAK_SIZE = 8192  # rows and columns of the product that gives a GPU's peak

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


@dataclass
class Figures:
    """What was measured of one variant."""

    seconds: list[float]
    activations: int = 0

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)


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
    wanted, rows = labels != IGNORE, CHUNK // VOCABULARY

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


def peak_bytes(device: str, step: Step) -> int:
    """Highest memory of tensors during a step beyond what was there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def seconds(device: str, step: Step) -> float:
    """Of one step: on a GPU by the clock, on a CPU of the processors' time, which other programs lengthen less."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(size: str, device: str, rows: int, length: int, repeats: int, names: str) -> dict[str, Figures]:
    """Time and activations of variants on one batch; the time is of `repeats` rounds, taking turns (of (b) once)."""
    models = build(size, device)
    batch, labels = make_batch(models, rows, length)
    steps = {name: prepare(name, models, batch, labels) for name in names}
    figures = {name: Figures([]) for name in names}
    for name, step in steps.items():
        step()  # warm up, and let the optimizer make its states
        figures[name].activations = peak_bytes(device, step)
    for index in range(repeats):
        for name, step in steps.items():
            if name != "b" or index == 0:  # its time has no target
                figures[name].seconds.append(seconds(device, step))
    return figures


def fixed_bytes(size: str) -> int:
    """Of both models' weights, and the student's gradients and optimizer states, without the vision towers."""
    with torch.device("meta"):
        models = build(size, "meta")
    counts = [
        sum(p.numel() for name, p in model.named_parameters() if "vision_tower" not in name)
        for model in (models.teacher, models.student)
    ]
    return (counts[0] + 4 * counts[1]) * (2 if size == "7b" else 4)


def flops(models: Models, rows: int, length: int) -> float:
    """Of (c)'s matrix products: two a weight and token, the student's three times; attention's are causal, half."""
    total = 0.0
    for model, times in ((models.teacher, 1), (models.student, 3)):
        text = model.config.text_config
        weights = sum(p.numel() for name, p in model.model.language_model.named_parameters() if "layers" in name)
        answers = (length - IMAGE_TOKENS) // 2 - 1
        attention = 2 * length**2 * text.hidden_size * text.num_hidden_layers
        total += times * rows * (2 * weights * length + attention + 2 * answers * text.hidden_size * text.vocab_size)
    return total


def peak_flops() -> float:
    """Operations per second of one large bfloat16 product on the GPU."""
    a = torch.randn(PEAK_SIZE, PEAK_SIZE, device="cuda", dtype=torch.bfloat16)
    times = [seconds("cuda", lambda: a @ a) for _ in range(11)]
    return float(2 * PEAK_SIZE**3 / min(times))


def largest(size: str, length: int, name: str) -> int:
    """The most rows of which a step of the variant fits on the GPU, to an eighth."""
    models = build(size, "cuda")

    def fits(rows: int) -> bool:
        try:
            step = prepare(name, models, *make_batch(models, rows, length))
            step()
            step()
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            models.student.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
        return True

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def show(figures: dict[str, Figures], fixed: int, rows: int, length: int) -> bool:
    """Print one length's figures; returns whether the targets are met."""
    print(f"\nN = {length}, {rows} row(s); weights, gradients, optimizer states {fixed / 1e6:.0f} MB")
    for name, found in figures.items():
        times = f"{found.median:8.3f} s ({min(found.seconds):.3f} to {max(found.seconds):.3f})"
        whole = (found.activations + fixed) / 1e6
        print(f"  ({name}) {times}   activations {found.activations / 1e6:8.1f} MB   all {whole:8.1f} MB")
    a, b, c = (figures[name] for name in "abc")
    ratios = {
        "time": ("time (a) / (c)", a.median / c.median),
        "memory": ("all memory (a) / (c)", (a.activations + fixed) / (c.activations + fixed)),
        "released": ("activations (b) / (a)", b.activations / a.activations),
    }
    met = True
    for kind, (text, ratio) in ratios.items():
        least = kind == "released"
        line = f"  {text:22} {ratio:6.3f}"
        if not least or length == max(LENGTHS):
            good = ratio >= TARGETS[kind] if least else ratio <= TARGETS[kind]
            met &= good
            line += f"   target {'>=' if least else '<='} {TARGETS[kind]}: {'met' if good else 'MISSED'}"
        print(line)
    print(f"  {'activations (a) / (c)':22} {a.activations / c.activations:6.3f}", flush=True)
    return met


def fill_gpu(size: str, length: int, repeats: int) -> None:
    """Print the largest batch of (a) and (b), and how well (a) uses the GPU."""
    rows, theirs = (largest(size, length, name) for name in "ab")
    models = build(size, "cuda")
    work = flops(models, rows, length)
    del models
    median = measure(size, "cuda", rows, length, repeats, "a")["a"].median
    share = work / median / peak_flops()
    print(
        f"  largest batch: (a) {rows} rows, (b) {theirs}; (a) {rows / median:.1f} samples/s, "
        f"{work / median / 1e12:.0f} TFLOP/s, {share:.0%} of one large product's"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["small", "7b"], default="small", help="7b: 7B teacher, 1.7B student")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a row, N")
    parser.add_argument("--rows", type=int, default=1, help="B of the comparison")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.size == "7b" and arguments.device == "cpu":
        parser.error("--size 7b needs --device cuda")
    torch.set_num_threads(arguments.threads)
    fixed = fixed_bytes(arguments.size)
    clock = "wall" if arguments.device == "cuda" else "CPU"
    print(
        f"{clock} time of {arguments.repeats} steps each, median (least to most); load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    met = True
    for length in arguments.lengths:
        figures = measure(arguments.size, arguments.device, arguments.rows, length, arguments.repeats, "abc")
        met &= show(figures, fixed, arguments.rows, length)
        if arguments.device == "cuda":
            fill_gpu(arguments.size, length, arguments.repeats)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
