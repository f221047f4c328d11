"""optimum with optimum-onnx: ORTModelForCausalLM, float32."""

from pathlib import Path
from typing import Any

import child
import numpy as np


def export(model: Path, out: Path, precision: str) -> None:
    """Write the decoder with its past."""
    from optimum.exporters.onnx import main_export

    main_export(str(model), str(out), task="text-generation-with-past")


def start(out: Path, threads: int) -> child.Step:
    """Open it."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = ORTModelForCausalLM.from_pretrained(out, session_options=options, use_io_binding=False)
    state: dict[str, Any] = {"past": None, "length": 0}

    def step(ids: list[int]) -> np.ndarray:
        positions = torch.arange(state["length"], state["length"] + len(ids))[None]
        state["length"] += len(ids)
        found = model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, state["length"], dtype=torch.long),
            position_ids=positions,
            past_key_values=state["past"],
            use_cache=True,
        )
        state["past"] = found.past_key_values
        return found.logits[0, -1].numpy()

    return step


if __name__ == "__main__":
    child.main(export, start)
