"""What every exporter's script does: export a folder, or read tokens with what was exported and time it.

The scripts beside this one run in environments of their own, without this project; this file needs NumPy only.

    python SCRIPT export MODEL OUT [PRECISION]
    python SCRIPT run OUT TOKENS.npy LOGITS.npy PROMPT_LENGTH THREADS
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

# Reads ids after those before and returns the logits of the next token, [vocabulary].
Step = Callable[[list[int]], np.ndarray]
CONTEXT = 512


def main(export: Callable[[Path, Path, str], None], start: Callable[[Path, int], Step]) -> None:
    """Do what the command line asks for."""
    if sys.argv[1] == "export":
        model, out, *precision = sys.argv[2:]
        export(Path(model), Path(out), *precision)
        print(json.dumps({"peak_mb": peak_mb()}))
        return
    out, tokens, logits, length, threads = sys.argv[2:]
    step = start(Path(out), int(threads))
    found = read(step, np.load(tokens).tolist(), int(length), Path(logits))
    print(json.dumps({**found, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Highest resident memory of this process, or of the largest one it started."""
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's from before exec
    own = int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1e3


def read(step: Step, tokens: list[int], length: int, logits: Path) -> dict[str, float]:
    """Read the prompt at once and the rest one by one; returns both speeds in tokens per second.

    Args:
        step: the model.
        tokens: of the text.
        length: how many of them are the prompt.
        logits: gets what follows the prompt's end and each of the others, [N - length, vocabulary].
    """
    begin = time.perf_counter()
    rows, seconds = [np.array(step(tokens[:length]))], []
    prefill = length / (time.perf_counter() - begin)
    for token in tokens[length:-1]:
        begin = time.perf_counter()
        row = step([token])
        seconds.append(time.perf_counter() - begin)
        rows.append(np.array(row))
    np.save(logits, np.stack(rows).astype(np.float32))
    return {"prefill": prefill, "decode": 1 / median(seconds)}
