"""optimum-executorch: XNNPACK, 4-bit weights and 8-bit activations, custom attention and cache, 8-bit embedding."""

from pathlib import Path

import child
import numpy as np


def export(model: Path, out: Path, precision: str) -> None:
    """Write model.pte."""
    from optimum.exporters.executorch import main_export

    main_export(
        model_name_or_path=str(model),
        task="text-generation",
        recipe="xnnpack",
        output_dir=str(out),
        use_custom_sdpa=True,
        use_custom_kv_cache=True,
        qlinear="8da4w",
        qembedding="8w",
        max_seq_len=child.CONTEXT,
    )


def start(out: Path, threads: int) -> child.Step:
    """Open it."""
    import torch
    from executorch.extension.pybindings import portable_lib
    from optimum.executorch import ExecuTorchModelForCausalLM

    model = ExecuTorchModelForCausalLM.from_pretrained(str(out))
    portable_lib._unsafe_reset_threadpool(threads)
    state = {"length": 0}

    def step(ids: list[int]) -> np.ndarray:
        positions = torch.arange(state["length"], state["length"] + len(ids))
        state["length"] += len(ids)
        return model.forward(torch.tensor([ids]), positions)[0, -1].float().numpy()

    return step


if __name__ == "__main__":
    child.main(export, start)
