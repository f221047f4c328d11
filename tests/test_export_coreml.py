"""Core ML: the saved programs, interpreted in NumPy, compute what the checkpoint computes and write their states."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools is not installed")

import coremltools as ct
import torch
from torch import nn

import vlm.runtimes.coreml
from export._coreml_modules import HalfRMSNorm
from export._coreml_weights import to_bytes, to_palettes
from export.formats.coreml import check_states
from tests.artifacts import cosine, greedy, pixels, reference, teacher_forced, write_artifact
from tests.tiny import random_model
from vlm.errors import CheckFailed, UserError
from vlm.manifest import Manifest
from vlm.models.checkpoint import Checkpoint, load_checkpoint
from vlm.runtimes._mil import Program, constants
from vlm.runtimes._mil_ops import OPERATIONS
from vlm.runtimes.coreml import CoreMlRuntime
from vlm.runtimes.torch import TorchRuntime

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="these tests are about the interpreter used elsewhere")


@pytest.fixture(scope="module", params=["fp16", "int4", "int8", "pal4", "int4,vision=int8,head=fp16"])
def exported(
    request: pytest.FixtureRequest, random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Manifest]:
    """fp16 of the tiny model; int4 of one with fewer KV heads than heads and an intermediate size no block divides."""
    checkpoint = load_checkpoint(random_checkpoint)
    if request.param.startswith("int4"):
        sizes = {"num_key_value_heads": 2, "intermediate_size": 168}
        model = random_model(checkpoint.model.lm_head.out_features, checkpoint.facts.image_token_id, **sizes)
        checkpoint = dataclasses.replace(checkpoint, model=model)
    folder = tmp_path_factory.mktemp("coreml")
    return checkpoint, write_artifact(checkpoint, f"coreml:{request.param}", folder)


@pytest.fixture
def checkpoint(exported: tuple[Checkpoint, Manifest]) -> Checkpoint:
    return exported[0]


@pytest.fixture
def artifact(exported: tuple[Checkpoint, Manifest]) -> Manifest:
    return exported[1]


def test_vision_tower_equals_torch_with_the_weights_in_the_file(checkpoint: Checkpoint, artifact: Manifest) -> None:
    ours = CoreMlRuntime(Path(artifact.name), 1).encode_image(pixels())
    truth = reference(checkpoint, artifact).encode_image(pixels())
    assert cosine(ours.features, truth.features) >= 0.999
    assert cosine(ours.tokens, truth.tokens) >= 0.999


def test_logits_equal_torch_with_the_weights_in_the_file(checkpoint: Checkpoint, artifact: Manifest) -> None:
    truth, ours = reference(checkpoint, artifact), CoreMlRuntime(Path(artifact.name), 1)
    ids = ours.prompt("What color is the circle?")
    answer = greedy(truth, ids)
    ours_logits, true_logits = (teacher_forced(runtime, ids, answer) for runtime in (ours, truth))
    assert cosine(ours_logits, true_logits) >= (0.9999 if artifact.precision == "fp16" else 0.998)
    if artifact.precision == "fp16":
        assert greedy(ours, ids) == greedy(TorchRuntime(checkpoint), ids)


@pytest.mark.parametrize("states", [[], ["k"]])
def test_apples_program_reads_its_description_once_and_starts_each_answer_with_new_states(
    monkeypatch: pytest.MonkeyPatch, states: list[str]
) -> None:
    model = Mock(**{"get_spec.return_value.description.state": states})
    tools = Mock(**{"models.MLModel.return_value": model})
    monkeypatch.setattr(vlm.runtimes.coreml, "coremltools", lambda: tools)
    program = vlm.runtimes.coreml._AppleProgram(Path("decoder.mlpackage"))
    program.reset()
    program.reset()
    assert model.get_spec.call_count == 1
    assert model.make_state.call_count == (3 if states else 0)


def test_second_step_sees_the_first_one_in_the_states(artifact: Manifest) -> None:
    runtime = CoreMlRuntime(Path(artifact.name), 1)
    alone = runtime.forward(runtime.embed([7]))
    runtime.reset()
    runtime.forward(runtime.embed([5]))
    second = runtime.forward(runtime.embed([7]))
    runtime.reset()
    together = runtime.forward(runtime.embed([5, 7]))
    assert not np.allclose(second, alone, atol=1e-3)
    np.testing.assert_allclose(second, together, atol=1e-4)


def test_matrices_hold_as_many_values_as_their_storage_has(artifact: Manifest) -> None:
    decoder, tower = (
        dict(constants(Path(artifact.name) / f"{name}.mlpackage")) for name in ("decoder", "vision_encoder")
    )
    head = next(values for name, values in decoder.items() if name.startswith("head_weight"))
    up = next(values for name, values in decoder.items() if name.startswith("layers_1_mlp_up_proj"))
    assert len(np.unique(head)) > 256 or artifact.precision == "pal4"
    assert (len(np.unique(head[0, :32])) <= 16) == (artifact.precisions.head in ("int4", "pal4"))
    assert (len(np.unique(up[:16])) <= 16) == (artifact.precision == "pal4")
    assert (len(np.unique(up[0, :32])) <= 16) == (artifact.precisions.decoder in ("int4", "pal4"))
    quantized = any(name.startswith("layers_") and name.endswith("quantized") for name in tower)
    assert quantized == (artifact.precisions.vision == "int8")
    assert not any(name.startswith(("cos", "sin")) and name.endswith("quantized") for name in decoder)


def test_int8_is_what_coremltools_own_quantizer_makes() -> None:
    from coremltools.optimize._utils import compute_qparams

    matrix = torch.randn(8, 64).half()
    theirs, scale, _ = compute_qparams(matrix.numpy(), 8, True, "LINEAR_SYMMETRIC", np.int8, [1, 64])
    ours, our_scale = to_bytes(matrix)
    assert np.abs(ours.astype(int) - theirs).max() <= 1  # theirs divides in float16
    np.testing.assert_array_equal(our_scale, scale)


def test_palettes_lose_no_more_than_the_best_16_values_of_a_normal_distribution() -> None:
    """Max (1960): the optimal quantizer of 16 levels has a mean squared error of 0.009497."""
    matrix = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    indices, palettes = to_palettes(matrix)
    values = np.take_along_axis(palettes, indices.reshape(2, -1), 1).reshape(matrix.shape)
    assert ((values - matrix.numpy()) ** 2).mean() < 0.0105
    nearest = np.abs(matrix.numpy().reshape(2, -1, 1) - palettes[:, None].astype(np.float32)).argmin(-1)
    assert (nearest == indices.reshape(2, -1)).mean() > 0.999


def test_rows_that_make_no_group_share_one_palette() -> None:
    indices, palettes = to_palettes(torch.randn(10, 8))
    assert palettes.shape == (1, 16) and indices.shape == (10, 8)


def test_indexed_write_that_loses_the_state_is_refused(tmp_path: Path) -> None:
    class Indexed(nn.Module):
        cache: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(1, 8, 4))

        def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            self.cache[:, position] = x
            return self.cache.sum(1)

    example = (torch.ones(1, 1, 4), torch.tensor([3]))
    state = ct.StateType(wrapped_type=ct.TensorType(shape=(1, 8, 4), dtype=np.float16), name="cache")
    model = ct.convert(
        torch.jit.trace(Indexed(), example),
        inputs=[ct.TensorType("x", (1, 1, 4), dtype=np.float16), ct.TensorType("position", (1,), dtype=np.int32)],
        states=[state],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "indexed.mlpackage"))
    with pytest.raises(CheckFailed, match="0 state writes found, 2 expected"):
        check_states(tmp_path / "indexed.mlpackage", 1)


def test_matrix_whose_rows_do_not_divide_is_named(artifact: Manifest) -> None:
    named = any("layers_0_mlp_down_proj_weight" in note for note in artifact.notes)
    assert named == artifact.precision.startswith("int4")


def test_norm_equals_llamas_and_survives_float16() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(16, eps=1e-6)
    theirs.weight.data.normal_(1, 0.1)
    ours = HalfRMSNorm(theirs)
    x = torch.randn(1, 5, 16) * torch.tensor([1e-4, 1e-2, 1.0, 30.0, 1e3])[None, :, None]
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.half()(x[:, 2:].half()).float(), theirs.float()(x[:, 2:]), rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize(
    ("name", "call", "ours"),
    [
        ("gelu", nn.functional.gelu, {}),
        ("silu", nn.functional.silu, {}),
        ("softmax", lambda x: x.softmax(1), {"axis": 1}),
        ("layer_norm", lambda x: nn.functional.layer_norm(x, x.shape[2:]), {"axes": (2, 3), "epsilon": 1e-5}),
        ("avg_pool", lambda x: nn.functional.avg_pool2d(x, 2), {"kernel_sizes": (2, 2), "strides": (2, 2)}),
    ],
)
def test_operation_equals_torch(name: str, call: Any, ours: dict[str, Any]) -> None:
    x = torch.randn(1, 3, 4, 6) * 3
    np.testing.assert_allclose(OPERATIONS[name](x.numpy(), **ours), call(x).numpy(), atol=2e-6)


@pytest.mark.parametrize(("groups", "kernel", "stride", "pad"), [(1, 4, 4, 0), (1, 1, 1, 0), (6, 3, 1, 1)])
def test_convolution_equals_torch(groups: int, kernel: int, stride: int, pad: int) -> None:
    x, weight = torch.randn(1, 6, 8, 8), torch.randn(6, 6 // groups, kernel, kernel)
    truth = nn.functional.conv2d(x, weight, torch.ones(6), stride, pad, 1, groups)
    ours = OPERATIONS["conv"](
        x.numpy(), weight.numpy(), (stride, stride), "custom", (pad,) * 4, (1, 1), groups, np.ones(6, np.float32)
    )
    np.testing.assert_allclose(ours, truth.numpy(), atol=1e-5)


def test_damaged_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"broken\.mlpackage"):
        Program(tmp_path / "broken.mlpackage")


def test_damaged_program_is_named(tmp_path: Path) -> None:
    package = tmp_path / "zeros.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Data" / "model.mlmodel").write_bytes(bytes(64))
    index = {"rootModelIdentifier": "root", "itemInfoEntries": {"root": {"path": "model.mlmodel"}}}
    (package / "Manifest.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"zeros\.mlpackage: not a complete \.mlpackage"):
        Program(package)


def test_runtime_says_that_it_is_emulated_and_imports_neither_torch_nor_transformers(artifact: Manifest) -> None:
    code = (
        "import sys; from pathlib import Path; from vlm.runtimes.coreml import open as open_artifact\n"
        "runtime = open_artifact(Path(sys.argv[1])); runtime.forward(runtime.embed([1]))\n"
        "sys.exit(not runtime.emulated or any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code, artifact.name], cwd=root, check=False).returncode == 0
