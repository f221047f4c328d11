"""What quantizers are told of the model at work is what the model does with pictures and questions."""

from pathlib import Path

import pytest
import torch

from export.calibration import calibration_embeddings, calibration_prompts, input_powers
from export.config import ExportConfig
from export.questions import questions
from export.run import parse_target, write_artifact
from tests import llava_data
from vlm.errors import UserError
from vlm.models.checkpoint import Checkpoint, load_checkpoint
from vlm.tokenizer import Tokenizer


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
    powers = input_powers(checkpoint, [x])
    assert powers.keys() == {f"{name}.weight" for name in seen}
    for name, power in seen.items():
        torch.testing.assert_close(powers[f"{name}.weight"], power, rtol=1e-4, atol=1e-6)


def own(folder: Path, **changes: int) -> ExportConfig:
    return ExportConfig(
        calibration_records=str(folder / "records.jsonl"),
        calibration_images=str(folder),
        **{"context_length": 256} | changes,
    )


def test_own_pictures_and_questions_take_the_scenes_place(
    checkpoint: Checkpoint, tmp_path: Path, own_cache: None
) -> None:
    llava_data.write(tmp_path, [llava_data.record(number, "a red dot") for number in range(4)])
    config, tokenizer = own(tmp_path, calibration_scenes=3), Tokenizer(checkpoint.facts.tokenizer)
    prompts = list(calibration_prompts(checkpoint, 3, questions(config)))
    answer = tokenizer.encode("a red dot")
    assert [prompt.ids[-len(answer) :].tolist() for prompt in prompts] == [answer] * 3
    asked = tokenizer.encode("\nwhat is 2? ASSISTANT:")
    assert prompts[2].ids[-len(asked + answer) : -len(answer)].tolist() == asked
    assert prompts[0].pixels.unique().numel() <= 3 and not torch.equal(prompts[0].pixels, prompts[1].pixels)
    pytest.importorskip("onnxruntime")
    (tmp_path / "out").mkdir()
    manifest = write_artifact(checkpoint, parse_target("onnx:int4"), tmp_path / "out", config)
    assert any("for 3 sequences of its inputs, from records.jsonl" in note for note in manifest.notes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no record in it"),
        ([llava_data.record(0, "yes", images=0)], "record 0 has 0 pictures, one expected"),
        ([llava_data.record(0, "yes"), llava_data.record(1, "")], "record 1 cannot be used: an answer is empty"),
        ([llava_data.record(0, "yes", name="broken.png")], "broken.png: not a readable image"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(
    rows: list[object], message: str, tmp_path: Path, own_cache: None
) -> None:
    llava_data.write(tmp_path, rows, broken=("broken.png",))
    with pytest.raises(UserError, match=message):
        list(questions(own(tmp_path))(16))


def test_records_without_the_folder_of_their_images_are_refused() -> None:
    with pytest.raises(UserError, match="Give both or none"):
        ExportConfig(calibration_records="records.jsonl")
