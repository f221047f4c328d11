"""GGUF: what llama.cpp computes from the written files is what the checkpoint computes."""

import dataclasses
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")

import llama_cpp
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from export._gguf_decoder import (
    deinterleave,
    importance_matrix,
    interleave,
    quantize,
    read_decoder,
    storage,
    write_decoder,
)
from export._gguf_mmproj import measure, write_mmproj
from export._gguf_vision import Q8_0, eight_bit, read_vision
from export._gguf_vocabulary import tokenization_differences
from export.calibration import calibration_embeddings, input_powers
from export.graph import VisionEncoder
from export.source import with_weights
from tests.artifacts import cosine, greedy, pixels, reference, teacher_forced, write_artifact
from tests.manifests import write_manifest
from tests.tiny import random_model
from vlm.errors import UserError
from vlm.manifest import Manifest, list_files
from vlm.models.checkpoint import Checkpoint, load_checkpoint
from vlm.prompts import TEMPLATES
from vlm.runtimes.llamacpp import VISION, LlamaCppRuntime
from vlm.runtimes.torch import TorchRuntime
from vlm.tokenizer import Tokenizer

MIXED = "q4_0,vision=q8_0,projector=q8_0,embedding=f16,head=q8_0"


def wide(folder: Path) -> Checkpoint:
    """A model whose rows K-quants divide, stored in float16."""
    checkpoint = load_checkpoint(folder)
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    model = random_model(checkpoint.model.lm_head.out_features, checkpoint.facts.image_token_id, **sizes)
    return dataclasses.replace(checkpoint, model=model.half())


@pytest.fixture(scope="module", params=["f16", "q4_0", "q5_k_m", MIXED])
def exported(
    request: pytest.FixtureRequest, random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Manifest]:
    checkpoint = wide(random_checkpoint) if request.param == "q5_k_m" else load_checkpoint(random_checkpoint)
    folder = tmp_path_factory.mktemp("gguf")
    return checkpoint, write_artifact(checkpoint, f"gguf:{request.param}", folder)


@pytest.fixture
def checkpoint(exported: tuple[Checkpoint, Manifest]) -> Checkpoint:
    return with_weights(exported[0], {})


@pytest.fixture
def artifact(exported: tuple[Checkpoint, Manifest]) -> Manifest:
    return exported[1]


def test_vision_tower_equals_torch(checkpoint: Checkpoint, artifact: Manifest) -> None:
    ours = LlamaCppRuntime(Path(artifact.name), 1).encode_image(pixels())
    truth = TorchRuntime(checkpoint).encode_image(pixels())
    assert cosine(ours.features, truth.features) >= 0.999
    assert cosine(ours.tokens, truth.tokens) >= 0.999


def test_logits_equal_torch_with_the_weights_in_the_file(checkpoint: Checkpoint, artifact: Manifest) -> None:
    truth, ours = reference(checkpoint, artifact), LlamaCppRuntime(Path(artifact.name), 1)
    ids = ours.prompt("What color is the circle?")
    answer = greedy(truth, ids)
    ours_logits, true_logits = (teacher_forced(runtime, ids, answer) for runtime in (ours, truth))
    assert cosine(ours_logits, true_logits) >= (0.9999 if artifact.precision == "f16" else 0.998)
    if artifact.precision == "f16":
        assert greedy(ours, ids) == greedy(TorchRuntime(checkpoint), ids)


def test_llama_cpp_splits_text_as_tokenizer_json_does(checkpoint: Checkpoint, artifact: Manifest) -> None:
    assert tokenization_differences(Path(artifact.name) / "decoder.gguf", checkpoint.facts.tokenizer) == []


def test_stock_llama_cpp_answers_a_text_as_torch_does(random_checkpoint: Path, tmp_path: Path) -> None:
    """The decoder alone, with llama.cpp's own tokenizer and loop, as every llama.cpp program runs it."""
    checkpoint = load_checkpoint(random_checkpoint)
    write_decoder(checkpoint, tmp_path / "decoder.gguf", 128)
    model = llama_cpp.Llama(str(tmp_path / "decoder.gguf"), n_ctx=128, n_threads=1, verbose=False, seed=0)
    prompt = TEMPLATES["v1"]("Is there a red circle?", has_image=False)[0]
    ids = model.tokenize(prompt.encode(), add_bos=True)
    assert ids == [checkpoint.facts.bos_id, *Tokenizer(checkpoint.facts.tokenizer).encode(prompt)]
    truth = TorchRuntime(checkpoint)
    truth.reset()
    expected = [int(truth.forward(truth.embed(ids)).argmax())]
    while len(expected) < 8:
        expected.append(int(truth.forward(truth.embed(expected[-1:])).argmax()))
    assert list(islice(model.generate(ids, top_k=1, temp=0.0), 8)) == expected


def test_stock_llama_cpp_is_wrong_with_mmproj_and_the_manifest_says_by_how_much(
    checkpoint: Checkpoint, artifact: Manifest
) -> None:
    folder = Path(artifact.name)
    encoder = VisionEncoder(checkpoint.model)
    found = measure(checkpoint, encoder, folder / "decoder.gguf", folder / "mmproj.gguf")
    assert found.cosine_min is not None and found.cosine_min <= (found.cosine_mean or 0) < 0.99
    assert artifact.settings["mmproj_cosine_min"] == pytest.approx(found.cosine_min, abs=1e-4)
    assert artifact.settings["mmproj_cosine_mean"] == pytest.approx(found.cosine_mean, abs=1e-4)
    assert any("issue 25814" in note and f"{found.cosine_min:.3f} worst" in note for note in artifact.notes)


def test_reset_forgets_the_previous_answer(artifact: Manifest) -> None:
    runtime = LlamaCppRuntime(Path(artifact.name), 1)
    first = runtime.forward(runtime.embed([1, 5, 7]))
    assert not np.allclose(runtime.forward(runtime.embed([1, 5, 7])), first)
    runtime.reset()
    np.testing.assert_allclose(runtime.forward(runtime.embed([1, 5, 7])), first, atol=1e-6)


def test_a_vision_tower_that_cannot_be_loaded_is_named(artifact: Manifest, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact.name, tmp_path / "damaged")
    (folder / VISION).write_bytes(b"no graph")
    write_manifest(folder, **{**artifact.model_dump(exclude={"schema_"}), "files": list_files(folder)})
    with pytest.raises(UserError, match=r"vision_encoder\.onnx: ONNX Runtime .* cannot load it"):
        LlamaCppRuntime(folder, 1)


def test_importance_matrix_lowers_the_error_where_the_model_looks(random_checkpoint: Path, tmp_path: Path) -> None:
    model = wide(random_checkpoint)
    write_decoder(model, tmp_path / "f16.gguf", 64)
    sequences = list(calibration_embeddings(model))
    powers, errors = input_powers(model, sequences), []
    for importance in (None, importance_matrix(model, sequences)):
        quantize(tmp_path / "f16.gguf", tmp_path / "q.gguf", "q4_k_m", importance)
        rounded = read_decoder(model, tmp_path / "q.gguf")
        exact = model.model.state_dict()
        errors.append(sum(float(((rounded[n] - exact[n].float()).square() * p).sum()) for n, p in powers.items()))
    assert errors[1] < 0.98 * errors[0]


def test_k_quants_say_their_types_and_their_calibration(artifact: Manifest) -> None:
    if artifact.precision == "q5_k_m":
        assert "Q5_K" in str(artifact.settings["matrix_types"])
        assert not any("in another type" in note or "No matrix" in note for note in artifact.notes)
    assert any("importance matrix of 16 pictures" in n for n in artifact.notes) == (artifact.precision == "q5_k_m")


def test_embedding_and_head_are_stored_as_asked(artifact: Manifest) -> None:
    if "embedding=f16" in artifact.precision:
        types = storage(Path(artifact.name) / "decoder.gguf")
        assert (types["token_embd.weight"], types["output.weight"]) == ("F16", "Q8_0")
        assert types["blk.0.attn_q.weight"] == "Q4_0"
        assert (artifact.precisions.embedding, artifact.precisions.head) == ("f16", "q8_0")
        assert not any("in another type" in note for note in artifact.notes)


def test_a_tower_in_q8_0_is_the_same_in_both_of_its_files_and_llama_cpp_takes_it(
    checkpoint: Checkpoint, artifact: Manifest, tmp_path: Path
) -> None:
    if "vision=q8_0" not in artifact.precision:
        assert (artifact.precisions.vision, artifact.precisions.projector) == ("f16", "f16")
        return
    folder, encoder = Path(artifact.name), VisionEncoder(checkpoint.model)
    ours = read_vision(checkpoint, folder / VISION)
    tensors = {tensor.name: tensor for tensor in GGUFReader(folder / "mmproj.gguf").tensors}
    theirs = [dequantize(t.data, t.tensor_type) for t in tensors.values() if t.tensor_type == Q8_0]
    linear = [weight.numpy() for name, weight in ours.items() if weight.ndim == 2 and "embedding" not in name]
    assert len(linear) == len(theirs) == 2 * 6 + 2  # two layers are read, and the projector
    assert all(any(np.array_equal(matrix, other) for other in theirs) for matrix in linear)
    runtimes = reference(checkpoint, artifact), LlamaCppRuntime(folder, 1)
    assert cosine(*(runtime.encode_image(pixels()).tokens for runtime in runtimes)) > 0.99999
    write_mmproj(checkpoint, encoder, tmp_path / "f16.gguf", [])
    wide = measure(checkpoint, encoder, folder / "decoder.gguf", tmp_path / "f16.gguf")
    assert artifact.settings["mmproj_cosine_min"] == pytest.approx(wide.cosine_min, abs=0.005)


def test_rows_of_the_tower_that_do_not_divide_stay_float16_and_are_named(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    checkpoint.model.model.multi_modal_projector.linear_1 = torch.nn.Linear(40, 64)
    rounded, ragged = eight_bit(checkpoint, {"vision": "f16", "projector": "q8_0"})
    assert ragged == ["model.multi_modal_projector.linear_1.weight"]
    assert rounded == ["model.multi_modal_projector.linear_2.weight"]


def test_grouped_heads_and_rows_that_do_not_divide(random_checkpoint: Path, tmp_path: Path) -> None:
    """Fewer KV heads than heads, and an intermediate size of 168 that no q4_0 block divides: right, and said."""
    checkpoint = load_checkpoint(random_checkpoint)
    vocabulary = checkpoint.model.lm_head.out_features
    model = random_model(vocabulary, checkpoint.facts.image_token_id, num_key_value_heads=2, intermediate_size=168)
    odd = dataclasses.replace(checkpoint, model=model)
    manifest = write_artifact(odd, "gguf:q4_0", tmp_path)
    assert storage(tmp_path / "decoder.gguf")["blk.0.ffn_down.weight"] != "Q4_0"
    assert any("blk.0.ffn_down.weight" in note for note in manifest.notes)
    truth, ours = reference(odd, manifest), LlamaCppRuntime(tmp_path, 1)
    ids = ours.prompt("Is there a square?")
    assert cosine(*(teacher_forced(runtime, ids, [9, 11]) for runtime in (ours, truth))) >= 0.998


def test_deinterleave_undoes_interleave() -> None:
    weight = torch.randn(24, 5)
    assert torch.equal(deinterleave(interleave(weight, 3), 3), weight)
    assert not torch.equal(interleave(weight, 3), weight)


def test_runtime_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, vlm.runtimes.llamacpp; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
