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
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.distill_variants import IMAGE_TOKENS, Models, Step, build, make_batch, prepare

LENGTHS = (655, 2191)
TARGETS = {"time": 1.10, "memory": 1.05, "released": 4.0}
PEAK_SIZE = 8192  # rows and columns of the product that gives a GPU's peak


@dataclass
class Figures:
    """What was measured of one variant."""

    seconds: list[float]
    activations: int = 0

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)


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
