"""The precision in which all backends compute."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products are summed: fp64 for fp64, fp32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to autocast's dtype where autocast is on, as torch's convolutions do; fp64 stays fp64."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off: matrix products inside keep the dtype of their factors. `.float()` alone would not make them."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
