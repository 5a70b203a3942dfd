"""The backend for compilers: K² shifted multiply-adds in plain torch, which torch.compile fuses into one pass."""

import torch.nn.functional as F
from torch import Tensor

from sit_atconv.ops.precision import accumulation_dtype


def shifted_sums(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve x (B, H, W, C), channels last throughout. In eager mode every multiply-add is a separate pass over x."""
    _, H, W, _ = x.shape
    K = kernels.shape[-1]
    p = K // 2
    padded = F.pad(x, (0, 0, p, p, p, p)).to(accumulation_dtype(x.dtype))
    taps = kernels.flatten(2).unbind(-1)  # K² times (B, C)
    windows = (padded[:, u : u + H, v : v + W] for u in range(K) for v in range(K))
    return sum(window * tap[:, None, None, :] for window, tap in zip(windows, taps, strict=True)).to(x.dtype)
