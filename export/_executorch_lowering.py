"""Traces and lowers one method after another, its constants in memory once, without passes that find nothing.

ExecuTorch copies every constant before a backend sees it and keeps both copies until the file is written, when the
bytes that the backend made of them have long taken their place. XNNPACK looks at each of a program's many parts with
every pass that it has.
"""

import copy
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from executorch.backends.xnnpack import _passes, xnnpack_preprocess
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir.lowered_backend_module import get_lowered_submodules
from torch import nn
from torch.export import ExportedProgram
from torch.export import export as trace

COMPILE = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
# What has to be in the name of an operator of the graph for a pass to change anything.
ONLY_FOR = {
    _passes.ConvertToUpsampleBilinear2d: "index",  # upsampling comes in decomposed
    _passes.ConvertToSDPAPass: "softmax",
    _passes.FuseBatchNormPass: "batch_norm",
    _passes.DecomposeBatchNorm: "batch_norm",
    _passes.DecomposeConcatenate: "cat",
    _passes.PReLUReshapePass: "prelu",
}


def lower(
    module: nn.Module, example: tuple[torch.Tensor, ...], dynamic_shapes: Any, partitioner: Any
) -> ExportedProgram:
    """Trace a module and hand the parts that a backend can run to it.

    Args:
        module: the method; whoever calls should keep no reference to it, its constants are then gone on return.
        example: its inputs.
        dynamic_shapes: which of their sizes stay open, as torch.export takes them; None for none.
        partitioner: says which parts.
    Returns:
        The program with the backend's bytes in it; see `forget`.
    """
    with torch.no_grad():
        program = trace(module, example, dynamic_shapes=dynamic_shapes, strict=False)
    with _lean_xnnpack():
        edge = to_edge_transform_and_lower(program, partitioner=[partitioner], compile_config=COMPILE)
    lowered: ExportedProgram = edge.exported_program()
    for _, part, _ in get_lowered_submodules(lowered.graph_module):
        for constants in (part.original_module.state_dict, part.original_module.constants):
            constants.update({name: _untouched(constant) for name, constant in constants.items()})
    return lowered


def forget(program: ExportedProgram) -> None:
    """Let go of the backend's bytes of a lowered program that is written: ExecuTorch's caches keep its graph alive."""
    for _, part, _ in get_lowered_submodules(program.graph_module):
        if part.named_data_store_output is not None:
            part.named_data_store_output.buffers.clear()


def _untouched(constant: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape with addresses but, never being touched, no memory: later passes ask for shapes."""
    place = mmap.mmap(-1, max(1, constant.numel() * constant.itemsize))
    like = torch.frombuffer(place, dtype=constant.dtype, count=constant.numel()).view(constant.shape)
    return nn.Parameter(like, requires_grad=False) if isinstance(constant, nn.Parameter) else like


class NeededPasses(_passes.XNNPACKPassManager):  # type: ignore[misc,unused-ignore]
    """XNNPACK's passes without those that would change nothing in the graph at hand."""

    passes: list[Any]

    def __init__(self, program: ExportedProgram, passes: list[Any] | None = None) -> None:
        super().__init__(program, passes)
        operators = " ".join(node.target.__name__ for node in program.graph.nodes if node.op == "call_function")
        self.passes = [each for each in self.passes if ONLY_FOR.get(each, "") in operators]


@contextmanager
def _lean_xnnpack() -> Iterator[None]:
    """Give XNNPACK the constants themselves where it would get copies, which it only reads, and the passes it needs."""

    def shared(program: ExportedProgram, compile_specs: list[Any]) -> ExportedProgram:
        constants = (*program.state_dict.values(), *program.constants.values())
        return copy.deepcopy(program, {id(constant): constant for constant in constants})

    every = xnnpack_preprocess.XNNPACKPassManager
    XnnpackBackend.copy_exported_program_for_preprocess = staticmethod(shared)
    xnnpack_preprocess.XNNPACKPassManager = NeededPasses
    try:
        yield
    finally:
        xnnpack_preprocess.XNNPACKPassManager = every
        del XnnpackBackend.copy_exported_program_for_preprocess  # the one of its base class is seen again
