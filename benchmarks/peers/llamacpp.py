"""llama.cpp's own converter (LLAMA_CPP names its source folder) and quantizer, Q4_0."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import child
import llama_cpp
import numpy as np


def export(model: Path, out: Path, precision: str) -> None:
    """Write a float16 .gguf, then the quantized one."""
    out.mkdir(parents=True)
    half, script = out / "f16.gguf", Path(os.environ["LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    subprocess.run([sys.executable, script, model, "--outfile", half, "--outtype", "f16"], check=True)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, 2
    code = llama_cpp.llama_model_quantize(str(half).encode(), str(out / "q4_0.gguf").encode(), ctypes.byref(parameters))
    half.unlink()
    if code:
        raise SystemExit(f"llama.cpp could not quantize (code {code})")


def start(out: Path, threads: int) -> child.Step:
    """Open it."""
    model = llama_cpp.Llama(
        str(out / "q4_0.gguf"), n_ctx=child.CONTEXT, n_batch=child.CONTEXT, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip

    def step(ids: list[int]) -> np.ndarray:
        model.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return np.ctypeslib.as_array(logits, (model.n_vocab(),))

    return step


if __name__ == "__main__":
    child.main(export, start)
