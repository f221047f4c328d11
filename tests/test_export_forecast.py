"""An export says what it needs before it starts, and does not start where that is not there."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import export.forecast
from export.config import ExportConfig
from export.forecast import BASE_MEMORY, disk_of, forecast, parameters
from export.formats.base import Cost
from export.run import run
from export.source import open_checkpoint
from vlm.errors import UserError
from vlm.models.checkpoint import Checkpoint


@pytest.fixture
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(random_checkpoint)


def test_it_says_what_is_needed_and_what_is_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    text = forecast(checkpoint, [("gguf", "q4_0"), ("coreml", "int4")], ExportConfig(), tmp_path / "no" / "no").text()
    assert text.startswith("needs 1.2 GB RAM, 0.04") and "; you have " in text


def test_all_targets_lie_on_the_disk_but_one_is_in_memory_at_a_time(checkpoint: Checkpoint, tmp_path: Path) -> None:
    one, two = (
        forecast(checkpoint, [("coreml", "fp16")] * count, ExportConfig(probes=4), tmp_path) for count in (1, 2)
    )
    assert two.memory == one.memory and two.disk == pytest.approx(2 * one.disk) and two.seconds == 2 * one.seconds


def test_a_new_format_brings_its_own_factors(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(COST=Cost(memory=1000.0, seconds=1.0, vision=1.0))
    monkeypatch.setattr(export.forecast, "load", lambda package, name: module)
    count = parameters(checkpoint)
    needs = forecast(checkpoint, [("new", "fp16")], ExportConfig(probes=1), tmp_path)
    assert needs.memory == BASE_MEMORY + 1000 * count and needs.seconds > count


def test_fewer_bits_are_smaller(checkpoint: Checkpoint) -> None:
    sizes = [disk_of(checkpoint, "gguf", precision) for precision in ("f16", "q8_0", "q5_k_m", "q4_0")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_exceptions_count(checkpoint: Checkpoint) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plain, head, decoder, all_ = (
        disk_of(checkpoint, "onnx", f"int4{text}")
        for text in ("", ",head=fp32", ",decoder=fp32", ",decoder=fp32,vision=fp32,projector=fp32,embedding=fp32")
    )
    assert plain < head < decoder < all_ == 4 * parameters(checkpoint)


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_an_export_that_cannot_fit_is_refused_unless_forced(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "memory":
        monkeypatch.setattr(export.forecast, "available_memory", lambda: 10**8)
    else:
        monkeypatch.setattr(export.forecast, "free_disk", lambda folder: 10**6)
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    config = ExportConfig(targets=["gguf:f16"], context_length=64, probes=1)
    step = {"memory": "close other programs", "disk": "free some space"}[what]
    with pytest.raises(UserError, match=rf"needs .* you have .*not enough {what}\. To get it, {step}.*--force"):
        run(config, checkpoint.folder, tmp_path)
    assert not list(tmp_path.iterdir())
    shares: list[float] = []
    forced = config.model_copy(update={"force": True, "context_length": 256})
    assert run(forced, checkpoint.folder, tmp_path, lambda share, _: shares.append(share)).finished()[0].is_dir()
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == 1.0


def test_an_unknown_amount_of_memory_refuses_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.forecast, "available_memory", lambda: None)
    needs = forecast(checkpoint, [("gguf", "f16")], ExportConfig(), tmp_path)
    needs.refuse_if_hopeless(force=False)
    assert "unknown amount of RAM" in needs.text()
