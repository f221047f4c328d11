"""The ONNX artifact computes what the checkpoint computes, from its folder alone."""

import dataclasses
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info  # noqa: E402
from onnx.numpy_helper import from_array  # noqa: E402

from export._onnx_blocks import ROUNDINGS  # noqa: E402
from export._onnx_decoder import GroupQueryDecoder  # noqa: E402
from export._onnx_weights import read_stored, store  # noqa: E402
from export.blocks import quantize_blocks  # noqa: E402
from export.config import ExportConfig  # noqa: E402
from export.formats.onnx import dequantized, write  # noqa: E402
from export.probes import scene_probes  # noqa: E402
from export.run import export_one  # noqa: E402
from export.source import with_weights  # noqa: E402
from tests.tiny import random_model, save_random_checkpoint  # noqa: E402
from vlm.errors import UserError  # noqa: E402
from vlm.manifest import read_manifest  # noqa: E402
from vlm.models.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from vlm.runtimes import open_runtime  # noqa: E402
from vlm.runtimes.base import Runtime  # noqa: E402
from vlm.runtimes.onnx import DECODER, EMBEDDING, VISION, cache_names  # noqa: E402
from vlm.runtimes.torch import TorchRuntime  # noqa: E402

MIXED = "int4-sym,vision=fp16,embedding=int8-sym,decoder=int4-128,head=fp16"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model; two query heads share a key-value head, so that grouping is exported too."""
    return save_random_checkpoint(tmp_path_factory.mktemp("gqa") / "checkpoint", num_key_value_heads=2)


@pytest.fixture(scope="module")
def artifacts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One artifact per precision; int4 keeps its weights beside the graphs, as models beyond 2 GiB must.

    Rounded decoders compute with float activations here, so that nothing but the graph can differ from torch.
    """
    out, config = tmp_path_factory.mktemp("artifacts"), ExportConfig(probes=2, threads=1)
    folders = {"onnx-fp32": export_one(checkpoint, "onnx:fp32", out, config)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export._onnx_decoder.ACTIVATIONS", 0)
        folders["onnx-mixed"] = export_one(checkpoint, f"onnx:{MIXED}", out, config)
        patch.setattr("export._onnx_graph.INLINE_LIMIT", 0)
        return folders | {"onnx-int4": export_one(checkpoint, "onnx:int4", out, config)}


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> TorchRuntime:
    return TorchRuntime(load_checkpoint(checkpoint))


@pytest.fixture(params=["onnx-fp32", "onnx-int4", "onnx-mixed"])
def pair(
    request: pytest.FixtureRequest, artifacts: dict[str, Path], reference: TorchRuntime
) -> tuple[Runtime, Runtime]:
    """An artifact's runtime and torch with the very weights the artifact holds."""
    folder = artifacts[request.param]
    checkpoint = load_checkpoint(reference.folder)
    weights = dequantized(checkpoint, read_manifest(folder).precision, folder)
    return open_runtime(folder, 1), TorchRuntime(with_weights(checkpoint, weights or {}))


def embeddings(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 64)).astype(np.float32)


def logits(runtime: Runtime, pieces: list[np.ndarray]) -> np.ndarray:
    runtime.reset()
    return np.stack([runtime.forward(piece) for piece in pieces])


def test_image_features_and_vision_tokens_equal_torch(pair: tuple[Runtime, Runtime]) -> None:
    ours, theirs = (runtime.encode_image(runtime.pixels(scene_probes(1)[0].image)) for runtime in pair)
    assert ours.features is not None and ours.tokens.shape == (144, 64)
    np.testing.assert_allclose(ours.features, theirs.features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.tokens, theirs.tokens, rtol=1e-4, atol=1e-5)


def test_embeddings_equal_torch(pair: tuple[Runtime, Runtime]) -> None:
    ours, theirs = (runtime.embed([0, 5, 17, 5]) for runtime in pair)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_prefill_and_every_cached_step_equal_torch(pair: tuple[Runtime, Runtime]) -> None:
    x = embeddings(30)
    ours, theirs = (logits(runtime, [x[:25], *np.split(x[25:], 5)]) for runtime in pair)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(pair: tuple[Runtime, Runtime]) -> None:
    x, runtime = embeddings(30), pair[0]
    np.testing.assert_allclose(
        logits(runtime, [x[:7], x[7:8], x[8:30]])[-1], logits(runtime, [x])[-1], rtol=1e-4, atol=1e-5
    )


def test_reset_forgets_the_sequence_before(pair: tuple[Runtime, Runtime]) -> None:
    x, runtime = embeddings(12), pair[0]
    first = logits(runtime, [x])
    runtime.forward(x[:3])
    np.testing.assert_array_equal(logits(runtime, [x]), first)


def test_answers_equal_torch_token_by_token(artifacts: dict[str, Path], reference: TorchRuntime) -> None:
    runtime = open_runtime(artifacts["onnx-fp32"], 1)
    for probe in scene_probes(3):
        ours, theirs = (r.answer(probe.image, probe.question, max_new_tokens=12) for r in (runtime, reference))
        assert ours.tokens == theirs.tokens


def test_the_files_have_the_fields_names(artifacts: dict[str, Path]) -> None:
    graphs = {file: onnx.load(artifacts["onnx-int4"] / file).graph for file in (VISION, EMBEDDING, DECODER)}
    names = {file: ([i.name for i in g.input], [o.name for o in g.output]) for file, g in graphs.items()}
    assert names[VISION] == (["pixel_values"], ["image_features", "patch_features"])
    assert names[EMBEDDING] == (["input_ids"], ["inputs_embeds"])
    assert names[DECODER][0][:4] == [
        "inputs_embeds", "attention_mask", "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    assert names[DECODER][1] == ["logits", *(f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value"))]


def test_int4_holds_every_linear_layer_and_the_table_as_integers(artifacts: dict[str, Path], checkpoint: Path) -> None:
    folder, loaded = artifacts["onnx-int4"], load_checkpoint(checkpoint)
    weights = dequantized(loaded, "int4", folder)
    assert weights is not None
    used = {
        f"{name}.weight"
        for name, module in loaded.model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        # The last vision layer is behind the selected one; position embeddings stay float.
        and "layers.2" not in name
        and "position" not in name
    }
    assert set(weights) == used
    assert read_manifest(folder).bytes < read_manifest(artifacts["onnx-fp32"]).bytes


def test_weights_beside_a_graph_are_listed_in_the_manifest(artifacts: dict[str, Path]) -> None:
    paths = {file.path for file in read_manifest(artifacts["onnx-int4"]).files}
    assert {DECODER, f"{DECODER}.data", VISION, f"{VISION}.data", EMBEDDING, f"{EMBEDDING}.data"} <= paths


@pytest.mark.parametrize(
    "precision", ["int8", "int4-sym-128", "fp16", "int4-sym,vision=int8-dynamic,projector=int8-dynamic"]
)
def test_activations_of_8_bits_and_halves_pass_their_parity(precision: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = export_one(checkpoint, f"onnx:{precision}", tmp_path, ExportConfig(probes=1, threads=1))
    parity = read_manifest(folder).parity
    assert parity is not None and parity.passed


def test_the_manifest_says_what_is_rounded(artifacts: dict[str, Path]) -> None:
    manifest = read_manifest(artifacts["onnx-int4"], checksums=True)
    assert manifest.precisions.model_dump() == {
        "vision": "int8", "projector": "int8", "embedding": "int4", "decoder": "int4", "head": "int4",
    }  # fmt: skip
    assert manifest.settings == {"layers": 2, "kv_heads": 2, "head_dim": 16}
    assert manifest.versions["onnxruntime"] == onnxruntime.__version__


def test_fp32_rounds_nothing(artifacts: dict[str, Path], checkpoint: Path) -> None:
    assert dequantized(load_checkpoint(checkpoint), "fp32", artifacts["onnx-fp32"]) is None


@pytest.mark.parametrize("storage", ["fp16", *ROUNDINGS])
@pytest.mark.parametrize("columns", [32, 96, 50])
def test_the_engine_multiplies_by_exactly_what_is_read_back(storage: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    matrix = rng.standard_normal((17, columns)).astype(np.float32)
    graph = make_graph(
        [make_node("MatMul", ["x", "w"], ["y"])],
        "one",
        [make_tensor_value_info("x", 1, [2, columns])],
        [make_tensor_value_info("y", 1, [2, 17])],
        [from_array(np.ascontiguousarray(matrix.T), "w")],
    )
    model = make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10)
    store(model, lambda _: storage, 0)
    read = read_stored(model)["w"]
    assert np.abs(read - matrix).max() < 2 * np.ptp(matrix) / 2 ** (4 if storage.startswith("int4") else 8)
    x = rng.standard_normal((2, columns)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ read.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ["fp16", *ROUNDINGS])
def test_the_engine_looks_up_exactly_what_is_read_back(storage: str) -> None:
    table = np.random.default_rng(0).standard_normal((9, 160)).astype(np.float32)  # no whole blocks of 128
    graph = make_graph(
        [make_node("Gather", ["t", "ids"], ["y"])],
        "one",
        [make_tensor_value_info("ids", 7, [4])],
        [make_tensor_value_info("y", 1, [4, 160])],
        [from_array(table, "t")],
    )
    model = make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10)
    store(model, lambda _: storage, 0)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.array([3, 0, 8, 3])
    np.testing.assert_array_equal(session.run(None, {"ids": ids})[0], read_stored(model)["t"][ids])


def test_a_graph_that_does_not_share_its_cache_gives_the_same_logits(artifacts: dict[str, Path]) -> None:
    folder = artifacts["onnx-int4"]
    runtime, x = open_runtime(folder, 1), embeddings(9)
    expected = logits(runtime, [x[:8], x[8:]])[-1]
    session = onnxruntime.InferenceSession(str(folder / DECODER), providers=["CPUExecutionProvider"])
    past, present = cache_names(2)
    cache = [np.zeros((1, 2, 0, 16), np.float32)] * len(past)
    for piece, total in ((x[:8], 8), (x[8:], 9)):
        feed = {"inputs_embeds": piece[None], "attention_mask": np.ones((1, total), np.int64)}
        row, *cache = session.run(["logits", *present], feed | dict(zip(past, cache, strict=True)))
    np.testing.assert_allclose(row[0, 0], expected, rtol=1e-4, atol=1e-5)


def test_more_tokens_than_the_context_are_refused(artifacts: dict[str, Path]) -> None:
    runtime = open_runtime(artifacts["onnx-int4"], 1)
    with pytest.raises(UserError, match="would have 513 tokens, the context holds 512"):
        runtime.forward(embeddings(513))


@pytest.mark.parametrize(("text", "message"), [({"head_dim": 20}, "heads of 20"), ({"hidden_act": "gelu"}, "gelu")])
def test_a_decoder_that_the_engine_has_no_operator_for_is_refused(
    text: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    model = random_model(40, 3, **text)
    opened = dataclasses.replace(load_checkpoint(checkpoint), model=model)
    with pytest.raises(UserError, match=message):
        GroupQueryDecoder(opened, tmp_path / DECODER, 64, {"decoder": "int4", "head": "int4"}, None)


def test_blocks_keep_zero_exact_and_choose_a_range_no_worse_than_the_plain_one() -> None:
    matrix = np.random.default_rng(0).standard_t(3, (8, 64)).astype(np.float32)
    matrix[:, ::7] = 0
    rounded = quantize_blocks(matrix, ROUNDINGS["int4"]).dequantize(64)
    assert (rounded[:, ::7] == 0).all()
    x = matrix.reshape(8, 2, 32)
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = (high - low) / 15
    plain = (np.clip(np.round(x / scale) + np.round(-low / scale), 0, 15) - np.round(-low / scale)) * scale
    assert ((rounded - matrix) ** 2).sum() <= ((plain.reshape(8, 64) - matrix) ** 2).sum() * (1 + 1e-5)


def test_a_shared_embedding_and_head_can_be_rounded_differently(checkpoint: Path) -> None:
    loaded: Checkpoint = load_checkpoint(checkpoint)
    loaded.model.lm_head.weight = loaded.model.get_input_embeddings().weight
    table = torch.zeros_like(loaded.model.lm_head.weight)
    changed = with_weights(loaded, {"model.language_model.embed_tokens.weight": table}).model
    assert torch.equal(changed.get_input_embeddings().weight, table)
    assert torch.equal(changed.lm_head.weight, loaded.model.lm_head.weight)


def test_the_artifact_runs_without_torch_and_transformers(artifacts: dict[str, Path]) -> None:
    program = (
        "import sys; from pathlib import Path; from PIL import Image; from vlm.runtimes import open_runtime\n"
        f"runtime = open_runtime(Path({str(artifacts['onnx-int4'])!r}), 1)\n"
        "runtime.answer(Image.new('RGB', (64, 48)), 'What?', max_new_tokens=3)\n"
        "print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_traced_weights_are_gone_when_they_are_written(tmp_path: Path) -> None:
    opened = load_checkpoint(save_random_checkpoint(tmp_path / "other", seed=5))
    table = opened.model.get_input_embeddings().weight.detach()
    write(opened, "int4", tmp_path, 64)
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    alike = [each for each in tensors if each.shape == table.shape and torch.equal(each, table)]
    assert all(each.data_ptr() == table.data_ptr() for each in alike)
