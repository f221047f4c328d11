"""ONNX Runtime GenAI's model builder, 4 bits (blocks of 32) for the CPU."""

import json
import runpy
import sys
from pathlib import Path

import child
import numpy as np


def export(model: Path, out: Path, precision: str) -> None:
    """Write the model and genai_config.json."""
    sys.argv = ["builder", "-i", str(model), "-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(out / "cache")]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def start(out: Path, threads: int) -> child.Step:
    """Open it."""
    import onnxruntime_genai

    path = out / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config))
    model = onnxruntime_genai.Model(str(out))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=child.CONTEXT, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)

    def step(ids: list[int]) -> np.ndarray:
        generator.append_tokens(np.array([ids], np.int32))
        return np.asarray(generator.get_logits())[0, -1]

    return step


if __name__ == "__main__":
    child.main(export, start)
