"""Where numbers are kept wider than the models compute: losses and probabilities are float32 at least."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where it is wider."""
    return torch.promote_types(dtype, torch.float32)


def wide(value: Tensor) -> Tensor:
    """In float32 at least."""
    return value.to(wide_dtype(value.dtype))
