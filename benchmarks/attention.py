"""Times one training step of the built-in student's decoder with both attentions: `python -m benchmarks.attention`.

Measured in one process, the two taking turns: transformers' "sdpa" (PyTorch's fused attention) and "dense" of
distill.dense_attention, which training on CPUs uses. Shown with each: how many times the lower bound it takes, the
step's matrix products at the speed of one large product on this machine.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from distill.config import DistillConfig, Student
from distill.dense_attention import DENSE, additive_mask
from pocketvlm.pipeline import RunConfig
from vlm.data.collator import PADDING, segment_mask

ROOT = Path(__file__).parents[1]
SDPA = "sdpa"
PREFIX = 146  # bos, vision tokens and the words around them
TURN = 14  # tokens of a question with its answer
WARM_UP = 2
PEAK_SIZE = 1024  # rows and columns of the product that gives the peak
PEAK_REPEATS = 10
LEAST_REPEATS = 10


def student_sizes(config: DistillConfig) -> Student:
    """The sizes of the configuration's student.

    Raises:
        SystemExit: it starts from a checkpoint instead.
    """
    if isinstance(config.student, str):
        raise SystemExit(f"the student is the checkpoint {config.student}: sizes are needed")
    return config.student


def build(sizes: Student) -> LlamaModel:
    """A decoder of these sizes with random weights; the vocabulary plays no part."""
    torch.manual_seed(0)
    text = sizes.model_dump(exclude={"initializer_range"})
    return LlamaModel(LlamaConfig(**text, vocab_size=8, pad_token_id=None)).train()


def visible(batch: int, length: int) -> Tensor:
    """The mask of rows of one prefix and turns that cannot see each other, bool [B, 1, N, N]."""
    turns = (torch.arange(length) - PREFIX).div(TURN, rounding_mode="floor") + 1
    segments = turns.clamp(min=0)[None].repeat(batch, 1)  # [B, N]
    segments[1:, -TURN:] = PADDING
    return segment_mask(segments)


def training_step(model: LlamaModel, embeds: Tensor, mask: Tensor) -> None:
    """Forward in bfloat16 autocast and backward, with embeddings [B, N, D] that want a gradient too."""
    model.zero_grad(set_to_none=True)
    embeds.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        states = model(inputs_embeds=embeds, attention_mask=additive_mask(mask), use_cache=False).last_hidden_state
    states.float().square().mean().backward()


def milliseconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time of one call, and the processors' time, which other programs lengthen less."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def measure(sizes: Student, batch: int, length: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Both times of `repeats` training steps with each attention, taking turns so that both meet the same load."""
    model, mask = build(sizes), visible(batch, length)
    embeds = torch.randn(batch, length, sizes.hidden_size, requires_grad=True)  # [B, N, D]
    times: dict[str, list[tuple[float, float]]] = {SDPA: [], DENSE: []}
    for index in range(-WARM_UP, repeats):
        for name, taken in times.items():
            model.set_attn_implementation(name)
            both = milliseconds(lambda: training_step(model, embeds, mask))
            if index >= 0:
                taken.append(both)
    return times


def step_flops(sizes: Student, batch: int, length: int) -> int:
    """Floating point operations of the step's matrix products: forward once, backward twice as much."""
    width, heads = sizes.hidden_size, sizes.num_attention_heads
    kv_width = width // heads * sizes.num_key_value_heads
    linears = 2 * width * width + 2 * width * kv_width + 3 * width * sizes.intermediate_size
    forward = sizes.num_hidden_layers * (2 * batch * length * linears + 4 * batch * length * length * width)
    return 3 * forward


def peak_flops() -> float:
    """Operations per second of one large bfloat16 product, the best of a few by the processors' time per thread."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE).bfloat16() for _ in range(2))
    best = min(milliseconds(lambda: a @ b)[1] for _ in range(PEAK_REPEATS + 1)) / torch.get_num_threads()
    return 2 * PEAK_SIZE**3 / best * 1e3


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny.yaml")
    parser.add_argument("--batch", type=int, default=4, help="rows, B")
    parser.add_argument("--length", type=int, default=490, help="tokens of a row, N")
    parser.add_argument("--repeats", type=int, default=20, help=f"timed steps with each, at least {LEAST_REPEATS}")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.repeats < LEAST_REPEATS:
        parser.error(f"--repeats {arguments.repeats}: at least {LEAST_REPEATS} are needed for a median with a spread")
    torch.set_num_threads(arguments.threads)
    sizes = student_sizes(RunConfig.load(arguments.config).distill)
    times = measure(sizes, arguments.batch, arguments.length, arguments.repeats)
    peak = peak_flops()
    bound = step_flops(sizes, arguments.batch, arguments.length) / peak * 1e3
    print(
        f"one training step: {sizes.num_hidden_layers} layers of {sizes.hidden_size}, {sizes.num_attention_heads} "
        f"heads, intermediate {sizes.intermediate_size}; {arguments.batch} x {arguments.length} tokens, bfloat16 "
        f"autocast, {arguments.threads} thread(s), {arguments.repeats} repeats, load average {os.getloadavg()[0]:.1f}"
    )
    for kind, index in (("wall", 0), ("CPU", 1)):
        show(kind, {name: [both[index] for both in taken] for name, taken in times.items()}, bound)
    print(f"lower bound {bound:.1f} ms: the step's matrix products at {peak / 1e9:.0f} GFLOP/s")


def show(kind: str, times: dict[str, list[float]], bound: float) -> None:
    """Print medians, spreads and the ratio of one kind of time; `bound` is the lower bound in milliseconds."""
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, taken in times.items():
        spread = f"{min(taken):.1f} to {max(taken):.1f}"
        ratio = medians[name] / bound
        print(f"{kind:4} {name:5} median {medians[name]:7.1f} ms ({spread}), {ratio:.1f} times the lower bound")
    print(f"{kind:4} {SDPA} / {DENSE}: {medians[SDPA] / medians[DENSE]:.2f}")


if __name__ == "__main__":
    main()
