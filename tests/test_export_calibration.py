"""What quantizers are told of the model at work is what the model does with pictures and questions."""

from pathlib import Path

import pytest
import torch

from export.calibration import calibration_embeddings, input_powers
from vlm.models.checkpoint import Checkpoint, load_checkpoint


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(random_checkpoint)


def test_every_sequence_has_its_picture_and_all_differ(checkpoint: Checkpoint) -> None:
    first, second = calibration_embeddings(checkpoint, 2)
    assert first.shape[1] > checkpoint.image_tokens and first.dtype == torch.float32
    placeholder = checkpoint.model.get_input_embeddings().weight[checkpoint.facts.image_token_id]
    assert not (first[0] == placeholder).all(-1).any()
    assert first.shape != second.shape or not torch.equal(first, second)


def test_input_powers_are_those_of_the_whole_model_in_one_pass(checkpoint: Checkpoint) -> None:
    seen: dict[str, torch.Tensor] = {}
    x = next(calibration_embeddings(checkpoint, 1))
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].square().mean((0, 1))})
        )
        for name, module in checkpoint.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(("model.language_model", "lm_head"))
    ]
    with torch.no_grad():
        checkpoint.model(inputs_embeds=x)
    for hook in hooks:
        hook.remove()
    powers = input_powers(checkpoint, 1)
    assert powers.keys() == {f"{name}.weight" for name in seen}
    for name, power in seen.items():
        torch.testing.assert_close(powers[f"{name}.weight"], power, rtol=1e-4, atol=1e-6)
