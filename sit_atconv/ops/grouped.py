"""The reference backend: torch's grouped convolution, one group per sample and channel."""

import torch.nn.functional as F
from torch import Tensor

from sit_atconv.ops.precision import accumulation_dtype


def grouped_convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """One image of B·C channels, each its own group; x (B, H, W, C) is transposed to channels first and back."""
    B, H, W, C = x.shape
    K = kernels.shape[-1]
    accumulate = accumulation_dtype(x.dtype)
    image = x.to(accumulate).permute(0, 3, 1, 2).reshape(1, B * C, H, W)
    weight = kernels.to(accumulate).reshape(B * C, 1, K, K)
    y = F.conv2d(image, weight, padding=K // 2, groups=B * C)
    return y.view(B, C, H, W).permute(0, 2, 3, 1).to(x.dtype)
