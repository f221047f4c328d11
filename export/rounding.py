"""Whether written weights are the checkpoint's, up to what their storage explains."""

import torch

from vlm.bars import rounding_bar
from vlm.errors import CheckFailed
from vlm.manifest import Precision
from vlm.models.checkpoint import Checkpoint

PARTS = {
    "model.vision_tower.": "vision",
    "model.multi_modal_projector.": "projector",
    "model.language_model.embed_tokens.": "embedding",
    "lm_head.": "head",
}


def component(name: str) -> str:
    """The component (export.precision.COMPONENTS) that a weight of the checkpoint belongs to."""
    return next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "decoder")


def check_rounding(checkpoint: Checkpoint, weights: dict[str, torch.Tensor], stored: Precision, title: str) -> None:
    """Bind the written weights to the checkpoint's: parity is judged on the former, which a quantizer may spoil.

    Args:
        checkpoint: the model.
        weights: what was written, as floats, by the checkpoint's names.
        stored: how each component was to be stored.
        title: what the message calls the artifact.
    Raises:
        CheckFailed: a weight is further from the checkpoint than its component's storage explains.
    """
    state, storages = checkpoint.model.state_dict(), stored.model_dump()
    for name, weight in weights.items():
        storage = storages[component(name)] or stored.decoder
        exact, bar = state[name].float(), rounding_bar(storage)
        error = float((weight.float() - exact).norm() / exact.norm().clamp(min=1e-12))
        if not error <= bar:
            raise CheckFailed(
                f"{title}: {name} as written differs from the checkpoint by {error:.3f} of its norm, at most "
                f"{bar} expected of {storage}. Writing or reading back is wrong; see export/formats/."
            )
