"""Who runs the parts of a program: XNNPACK on every CPU, or an accelerator that this machine lowers to but has not.

Vulkan takes all three methods. Core ML takes the vision encoder alone: its converter knows no open sequence lengths
(NotImplementedError: Placeholder val must be a tensor), so the text methods stay with XNNPACK.
"""

from typing import Any

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.utils.quant_utils import is_dequant
from executorch.backends.xnnpack.utils.utils import get_input_node
from torch.export import ExportedProgram

BACKENDS = ("coreml", "vulkan")  # presets that name one: it computes in float16
_Dependencies = tuple[bool, list[torch.fx.Node]]


class WeightOnlyLinearConfig(LinearConfig):  # type: ignore[misc,unused-ignore]
    """Also gives XNNPACK the linear layers whose weight is rounded and whose input is not.

    XNNPACK has kernels for floats times 8-bit channels (f32_qc8w), but its partitioner takes such a layer for one of
    static quantization, misses its input's scale, and leaves it alone.
    """

    def _get_act_deps(self, node: torch.fx.Node, ep: ExportedProgram, precision: ConfigPrecisionType) -> _Dependencies:
        found: _Dependencies = super()._get_act_deps(node, ep, precision)
        return (True, []) if self._reads_floats(node, precision) else found

    def _get_output_deps(
        self, node: torch.fx.Node, ep: ExportedProgram, precision: ConfigPrecisionType
    ) -> _Dependencies:
        found: _Dependencies = super()._get_output_deps(node, ep, precision)
        return (True, []) if self._reads_floats(node, precision) else found

    def _reads_floats(self, node: torch.fx.Node, precision: ConfigPrecisionType) -> bool:
        return precision == ConfigPrecisionType.STATIC_QUANT and not is_dequant(get_input_node(node, self.act_idx))


def backend(precision: str) -> str | None:
    """The accelerator that a precision's preset names, whatever its exceptions; None for XNNPACK alone."""
    preset = precision.partition(",")[0]
    return preset if preset in BACKENDS else None


def partitioner(precision: str, method: str) -> Any:
    """The partitioner of a precision's method; libraries of other backends are imported only here."""
    if backend(precision) == "coreml" and method == "vision_encoder":
        return _coreml()
    return _vulkan() if backend(precision) == "vulkan" else _xnnpack()


def _xnnpack() -> Any:
    swap = {LinearConfig: WeightOnlyLinearConfig}
    return XnnpackPartitioner([swap.get(config, config) for config in ALL_PARTITIONER_CONFIGS])


def _coreml() -> Any:
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    specs = CoreMLBackend.generate_compile_specs(
        compute_precision=coremltools.precision.FLOAT16, minimum_deployment_target=coremltools.target.iOS18
    )
    return CoreMLPartitioner(compile_specs=specs)


def _vulkan() -> Any:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return VulkanPartitioner({"force_fp16": True})
