"""ExecuTorch's lowering holds a method's constants once, and none when they are packed; it runs the passes it needs."""

import gc
import weakref
from typing import Any

import pytest

pytest.importorskip("executorch.exir", reason="executorch is not installed")

import torch
from executorch.backends.xnnpack import _passes, xnnpack_preprocess
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.lowered_backend_module import get_lowered_submodules
from torch import nn

from export import _executorch_lowering as lowering


class Normed(nn.Module):
    """A convolution and a batch norm, which XNNPACK fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run both."""
        result: torch.Tensor = self.norm(self.conv(x))
        return result


def lowered_bytes(module: nn.Module, example: torch.Tensor) -> list[Any]:
    program = lowering.lower(module.eval(), (example,), None, XnnpackPartitioner())
    parts = [part for _, part, _ in get_lowered_submodules(program.graph_module)]
    return [(part.processed_bytes, part.named_data_store_output.buffers) for part in parts]


def test_constants_are_read_in_place_and_gone_when_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(32, 48)
    seen: list[int] = []
    weight, values, place = weakref.ref(layer.weight), layer.weight.detach().clone(), layer.weight.data_ptr()
    preprocess = XnnpackBackend.preprocess

    def spy(program: torch.export.ExportedProgram, compile_specs: list[object]) -> object:
        seen.extend(constant.data_ptr() for constant in program.state_dict.values())
        return preprocess(program, compile_specs)

    monkeypatch.setattr(XnnpackBackend, "preprocess", staticmethod(spy))
    [(_, buffers)] = lowered_bytes(layer, torch.zeros(1, 32))
    assert place in seen
    torch.testing.assert_close(layer.weight.detach(), values, rtol=0, atol=0)
    assert values.numpy().tobytes() in buffers
    del layer
    gc.collect()
    assert weight() is None


def test_what_is_written_can_be_forgotten() -> None:
    program = lowering.lower(nn.Linear(32, 48).eval(), (torch.zeros(1, 32),), None, XnnpackPartitioner())
    lowering.forget(program)
    [(_, part, _)] = get_lowered_submodules(program.graph_module)
    assert part.named_data_store_output.buffers == []


def test_passes_that_are_left_out_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for module, example in ((Normed(), torch.zeros(1, 3, 8, 8)), (nn.Linear(32, 48), torch.zeros(1, 32))):
        with monkeypatch.context() as all_passes:
            all_passes.setattr(lowering, "ONLY_FOR", {})
            expected = lowered_bytes(module, example)
        assert lowered_bytes(module, example) == expected


def test_passes_are_there_for_their_operators() -> None:
    program = torch.export.export(Normed().eval(), (torch.zeros(1, 3, 8, 8),))
    assert _passes.FuseBatchNormPass in lowering.NeededPasses(program).passes
    assert _passes.PReLUReshapePass not in lowering.NeededPasses(program).passes


def test_the_library_is_left_as_it_was() -> None:
    lowering.lower(nn.Linear(32, 48).eval(), (torch.zeros(1, 32),), None, XnnpackPartitioner())
    assert "copy_exported_program_for_preprocess" not in vars(XnnpackBackend)
    assert xnnpack_preprocess.XNNPACKPassManager is _passes.XNNPACKPassManager
