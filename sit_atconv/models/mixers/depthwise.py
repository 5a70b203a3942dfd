"""A static depthwise convolution of tokens, a part of several mixers."""

from torch import Tensor, nn

from sit_atconv.ops import per_sample_depthwise_conv2d


class Depthwise(nn.Conv2d):
    """One learnt k×k kernel and bias for each channel: tokens (B, N, C), grid (H, W) -> (B, N, C); zero padding ⌊k/2⌋.

    It has nn.Conv2d's weights and initialisation, and runs on the per-sample operator with the same kernels for all
    samples: tokens are not transposed, and it compiles for varying grids, where Inductor fails on Conv2d's gradient.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        kernels = self.weight.transpose(0, 1).expand(len(x), -1, -1, -1)
        return per_sample_depthwise_conv2d(x.unflatten(1, grid), kernels).flatten(1, 2) + self.bias
