"""Who runs the parts of a program: XNNPACK on every CPU, or an accelerator that this machine lowers to but has not.

Vulkan takes all three methods. Core ML takes the vision encoder alone: its converter knows no open sequence lengths
(NotImplementedError: Placeholder val must be a tensor), so the text methods stay with XNNPACK.
"""

from typing import Any

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

BACKENDS = ("coreml", "vulkan")  # presets that name one: it computes in float16


def backend(precision: str) -> str | None:
    """The accelerator that a precision's preset names, whatever its exceptions; None for XNNPACK alone."""
    preset = precision.partition(",")[0]
    return preset if preset in BACKENDS else None


def partitioner(precision: str, method: str) -> Any:
    """The partitioner of a precision's method; libraries of other backends are imported only here."""
    if backend(precision) == "coreml" and method == "vision_encoder":
        return _coreml()
    return _vulkan() if backend(precision) == "vulkan" else XnnpackPartitioner()


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
