"""ExecuTorch: what the C++ engine computes from model.pte is what the checkpoint computes, without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("executorch.exir", reason="executorch is not installed")

import torch

import export.formats.executorch as executorch_format
from tests.artifacts import cosine, greedy, pixels, reference, teacher_forced
from tests.executorch_artifacts import artifact_folder, checkpoint_folder, compiled_engine
from tests.tiny import save_random_checkpoint
from vlm.errors import CheckFailed, UserError
from vlm.manifest import Manifest, read_manifest
from vlm.models.checkpoint import Checkpoint, load_checkpoint
from vlm.runtimes import _executorch_library
from vlm.runtimes.executorch import MODEL, ExecutorchRuntime
from vlm.runtimes.executorch import open as open_executorch
from vlm.runtimes.torch import TorchRuntime

QUESTION = "What color is the circle?"


@pytest.fixture(scope="module", autouse=True)
def engine() -> Path:
    return compiled_engine()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(checkpoint_folder(tmp_path_factory, "fp32"))


@pytest.fixture(scope="module")
def rounded_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(checkpoint_folder(tmp_path_factory, "8da4w"))


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> ExecutorchRuntime:
    return open_executorch(artifact_folder(tmp_path_factory, "fp32"), 2)


@pytest.fixture(scope="module")
def rounded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact_folder(tmp_path_factory, "8da4w")


def test_float_artifact_equals_torch(checkpoint: Checkpoint, fp32: ExecutorchRuntime) -> None:
    truth = TorchRuntime(checkpoint)
    ours, theirs = fp32.encode_image(pixels()), truth.encode_image(pixels())
    assert cosine(ours.features, theirs.features) >= 0.9999
    assert cosine(ours.tokens, theirs.tokens) >= 0.9999
    ids = truth.prompt(QUESTION)
    answer = greedy(truth, ids)
    assert greedy(fp32, ids) == answer
    np.testing.assert_allclose(
        teacher_forced(fp32, ids, answer), teacher_forced(truth, ids, answer), rtol=1e-4, atol=1e-4
    )


def test_rounded_artifact_equals_torch_with_the_weights_in_the_file(
    rounded_checkpoint: Checkpoint, rounded_folder: Path
) -> None:
    truth, ours = reference(rounded_checkpoint, _manifest(rounded_folder)), open_executorch(rounded_folder, 2)
    ids = truth.prompt(QUESTION)
    answer = greedy(truth, ids)
    assert cosine(ours.encode_image(pixels()).tokens, truth.encode_image(pixels()).tokens) >= 0.998
    assert cosine(teacher_forced(ours, ids, answer), teacher_forced(truth, ids, answer)) >= 0.998


def test_weights_read_back_are_on_the_grid_that_the_manifest_states(
    rounded_checkpoint: Checkpoint, rounded_folder: Path
) -> None:
    weights = executorch_format.dequantized(rounded_checkpoint, "8da4w", rounded_folder)
    assert weights is not None
    names = [name for name, parameter in rounded_checkpoint.model.named_parameters() if parameter.ndim == 2]
    text = [name for name in names if name.endswith(("_proj.weight", "lm_head.weight")) and "vision_tower" not in name]
    assert len(text) == 8
    assert set(text) <= set(weights)
    for name, weight in weights.items():
        # Rows of the embedding and of 8-bit linears share a scale; elsewhere groups of 32 do.
        is_int4 = name in text and weight.shape[1] % 32 == 0
        levels, rows = (16, weight.reshape(-1, 32)) if is_int4 else (256, weight)
        assert max(len(torch.unique(row)) for row in rows) <= levels, name
    assert any("down_proj" in note for note in read_manifest(rounded_folder).notes)


def test_artifact_of_another_checkpoint_is_refused(rounded_folder: Path, tmp_path: Path) -> None:
    other = save_random_checkpoint(
        tmp_path / "other", seed=1, num_key_value_heads=2, intermediate_size=168, num_hidden_layers=1
    )
    with pytest.raises(CheckFailed, match="holds a linear that"):
        executorch_format.dequantized(load_checkpoint(other), "8da4w", rounded_folder)


def test_prefill_equals_one_token_at_a_time(fp32: ExecutorchRuntime) -> None:
    embeds = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)
    fp32.reset()
    at_once = fp32.forward(embeds)
    fp32.reset()
    fp32.forward(embeds[:30])
    one_by_one = [fp32.forward(row[None]) for row in embeds[30:]][-1]
    np.testing.assert_allclose(one_by_one, at_once, rtol=1e-5, atol=1e-5)


def test_more_tokens_than_the_context_are_refused(fp32: ExecutorchRuntime) -> None:
    fp32.reset()
    fp32.forward(np.zeros((250, 64), np.float32))
    with pytest.raises(UserError, match="would have 260 tokens, the context holds 256"):
        fp32.forward(np.zeros((10, 64), np.float32))


def test_engine_process_loads_neither_torch_nor_transformers(fp32: ExecutorchRuntime) -> None:
    program = """
import json, sys
from pathlib import Path
from PIL import Image
from vlm.runtimes import open_runtime
runtime = open_runtime(Path(sys.argv[1]), 1)
answer = runtime.answer(Image.new("RGB", (50, 40), "red"), "What?", 4)
mapped = Path("/proc/self/maps").read_text()
print(json.dumps([answer.tokens, "torch" in sys.modules, "transformers" in sys.modules, "libtorch" in mapped]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(fp32.folder)], capture_output=True, text=True, check=True, timeout=60
    )
    tokens, *imported = json.loads(done.stdout)
    assert len(tokens) == 4
    assert imported == [False, False, False]
    assert done.stderr == ""


def test_damaged_program_is_named(fp32: ExecutorchRuntime, tmp_path: Path) -> None:
    folder = shutil.copytree(fp32.folder, tmp_path / "damaged")
    program = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(bytes(4096) + program[4096:])
    with pytest.raises(UserError, match=r"model\.pte"):
        open_executorch(folder)


def test_stock_runner_generates_the_same_tokens(checkpoint: Checkpoint, fp32: ExecutorchRuntime) -> None:
    runner = pytest.importorskip("executorch.extension.llm.runner")
    sentencepiece = pytest.importorskip("sentencepiece")
    # ExecuTorch's tokenizers do not know the pre-tokenizer of our tokenizer.json; the SentencePiece model is the same.
    spm = checkpoint.folder.with_name("checkpoint-fp32-tokenizer") / "tokenizer.model"
    head, tail = "USER: ", f"\n{QUESTION} ASSISTANT:"
    ids = [checkpoint.facts.bos_id, *fp32.tokenizer.encode(head)]
    ids += [checkpoint.facts.image_token_id] * checkpoint.facts.image_tokens + fp32.tokenizer.encode(tail)
    pieces: list[str] = []
    runner.MultimodalRunner(str(fp32.folder / MODEL), str(spm), None).generate(
        [
            runner.make_text_input(head),
            runner.make_image_input(torch.from_numpy(pixels()[0])),
            runner.make_text_input(tail),
        ],
        runner.GenerationConfig(max_new_tokens=8, temperature=0.0, echo=False, num_bos=1),
        pieces.append,
    )
    names = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    expected = [names.id_to_piece(token).replace("\u2581", " ") for token in greedy(fp32, ids)]
    assert "".join(pieces) == "".join(expected)


def test_wheel_without_runtime_libraries_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(_executorch_library.importlib.util, "find_spec", lambda _: Spec())
    with pytest.raises(UserError, match=r"libexecutorch\.so.*1\.5"):
        _executorch_library.build()


def test_failed_compilation_shows_what_the_compiler_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(UserError, match="/nonexistent/c"):
        _executorch_library.build()
    assert list(tmp_path.iterdir()) == []


def _manifest(folder: Path) -> Manifest:
    """The manifest as tests.artifacts.reference wants it, named by its folder."""
    return read_manifest(folder).model_copy(update={"name": str(folder)})
