"""`pocketvlm sensitivity` rounds one layer at a time and proposes precisions that export takes."""

import json
import re
from pathlib import Path

import pytest
import torch

import export.forecast
from export import sensitivity
from export.calibration import Prompt
from export.forecast import scan_forecast
from export.run import parse_target
from export.sensitivity import Found, Layer, parts, passes, propose, scan, targets, tree
from pocketvlm.analysis.sensitivity import write
from vlm.errors import UserError
from vlm.models.checkpoint import Checkpoint, load_checkpoint


def _found(**layers: tuple[int, float, float]) -> list[Found]:
    return [Found(Layer(name, name, (), count), narrow, wide) for name, (count, narrow, wide) in layers.items()]


def test_every_matrix_that_is_read_is_in_one_layer(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    names = [name for layer in parts(checkpoint) for name in layer.parameters]
    assert len(names) == len(set(names))
    model = checkpoint.model
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    unread = {name for name in linears if "encoder.layers.2." in name}  # hidden_states[-2] of three layers is read
    assert set(names) == linears - unread | {"model.language_model.embed_tokens.weight"}


def test_fewer_bits_move_the_answers_more_and_the_page_shows_every_layer(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[int, int]] = []
    asked: list[int] = []
    answers = sensitivity._answers

    def count(checkpoint: Checkpoint, prompts: list[Prompt], embedded: list[torch.Tensor]) -> list[torch.Tensor]:
        asked.append(len(prompts))
        return answers(checkpoint, prompts, embedded)

    monkeypatch.setattr(sensitivity, "_answers", count)
    checkpoint = load_checkpoint(random_checkpoint)
    found = scan(checkpoint, 2, lambda *state: done.append(state))
    assert done[-1] == (len(found), len(found)) and sum(asked) == passes(checkpoint, 2)
    assert all(0 <= entry.wide < entry.narrow for entry in found)
    result = tree(found, 2, 6.0)
    assert result["mean_bits"] <= 6.0
    write(result, "student", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text()) == json.loads(json.dumps(result))
    text = (tmp_path / "out" / "index.html").read_text()
    assert all(entry.layer.name in text for entry in found) and "<svg" in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)  # one file that needs no other


def test_a_scan_says_what_it_needs_and_does_not_start_without_the_memory(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    few, many = (scan_forecast(checkpoint, passes(checkpoint, scenes), tmp_path) for scenes in (1, 64))
    assert many.seconds > 2 * few.seconds and many.memory == few.memory
    monkeypatch.setattr(export.forecast, "available_memory", lambda: 10**8)
    short = scan_forecast(checkpoint, 1, tmp_path)
    with pytest.raises(
        UserError, match=r"This scan needs 1\.2 GB RAM.* you have 0\.1 GB.*close other programs.*--force\."
    ):
        short.refuse_if_hopeless(force=False)
    short.refuse_if_hopeless(force=True)


@pytest.mark.parametrize(("bits", "wide"), [(4.7, set()), (5.2, {"head"}), (9.0, {"head", "vision", "decoder"})])
def test_the_components_that_gain_most_per_bit_get_more_first(bits: float, wide: set[str]) -> None:
    found = _found(vision=(20, 0.2, 0.1), decoder=(70, 0.3, 0.1), head=(10, 0.2, 0.0))
    assert {name for name, kind in propose(found, bits).items() if kind == "wide"} == wide


@pytest.mark.parametrize("wide", [{"head"}, {"decoder", "vision"}, set()])
def test_what_is_proposed_is_a_target(wide: set[str]) -> None:
    components = ("vision", "projector", "embedding", "decoder", "head")
    proposed = targets({name: "wide" if name in wide else "narrow" for name in components})
    for text in proposed:
        pytest.importorskip({"onnx": "onnxruntime", "coreml": "coremltools"}.get(text.partition(":")[0], "executorch"))
        parse_target(text)
    assert ("head=int8" in proposed[0]) == (wide == {"head"})
