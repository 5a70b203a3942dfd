"""A depthwise convolution of tokens, a part of several mixers."""

import torch
from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.ops import per_sample_depthwise_conv2d


def require_odd(kernel_size: int) -> None:
    """Raise `InputError` unless the kernel has a centre."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"kernel_size must be odd and positive, not {kernel_size}: an even kernel has no centre.")


class DepthwiseConv(nn.Conv2d):
    """Every channel is convolved with its own K×K kernel, zero padding ⌊K/2⌋: (B, N, C), grid (H, W) -> (B, N, C).

    Raises `InputError` for an even kernel size.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        require_odd(kernel_size)
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        image = x.unflatten(1, grid)
        if torch.compiler.is_compiling():  # Inductor fails on the gradient of torch's convolution when grids vary
            kernels = self.weight.squeeze(1).expand(len(x), -1, -1, -1)
            y = per_sample_depthwise_conv2d(image, kernels)
            return (y + self.bias.to(y.dtype)).flatten(1, 2)
        return super().forward(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
