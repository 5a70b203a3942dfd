"""Attentive Convolution (ATConv): a depthwise convolution with kernels generated from the image (arXiv 2510.20092)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.models.mixers.registry import register_mixer
from sit_atconv.ops import per_sample_depthwise_conv2d, pool_tokens

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}
POOLS = ("grid", "raster")


@register_mixer("atconv")
class ATConv(nn.Module):
    """Mix tokens with one K×K kernel per image and channel: (B, N, C), grid (H, W) -> (B, N, C), any H, W >= 1.

    The kernels are generated from the image's K×K average-pooled context (Eq. 7-8). Lateral inhibition subtracts a
    learnt share of its mean from each kernel (Eq. 9). The kernels are then convolved with the projected values
    (Eq. 10-11).

    Args:
        dim: width C.
        kernel_size: K, odd.
        pool: "grid" pools over (H, W) as the paper does; "raster" pools the flattened sequence into K² runs, as the
            authors' released code does.
        activation: φ of Eq. 8: "gelu" (the paper), "gelu_tanh" or "silu" (the two released code trees).

    Raises:
        InputError: for an even kernel size or an unknown pool or activation.
    """

    def __init__(self, dim: int, kernel_size: int = 3, pool: str = "grid", activation: str = "gelu") -> None:
        super().__init__()
        require_one_of(pool, POOLS, "pool")
        require_one_of(activation, ACTIVATIONS, "activation")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be odd and positive, not {kernel_size}: an even kernel has no centre.")
        self.dim, self.kernel_size, self.pool, self.activation = dim, kernel_size, pool, activation
        self.kernel_proj = nn.Linear(dim, dim)
        self.kernel_gen = nn.Linear(kernel_size**2, kernel_size**2)  # shared by all channels
        self.value_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.inhibition = nn.Parameter(torch.zeros(dim))  # λ = sigmoid(0) = ½ at the start

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        values = self.value_proj(x).view(B, *grid, C)
        y = per_sample_depthwise_conv2d(values, self.kernels(x, grid).to(values.dtype))
        return self.out_proj(y.reshape(B, N, C))

    def kernels(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The kernels α of Eq. 9 for tokens x (B, N, C): (B, C, K, K)."""
        # Context to kernel, Eq. 7-8. The paper projects N tokens and pools them into K²; we pool first. Pooling is
        # linear and its weights sum to 1, so the result is the same, and the projection costs K² tokens instead of N.
        context = ACTIVATIONS[self.activation](self.kernel_proj(self._pool(x, grid)))  # (B, K², C)
        kernels = self.kernel_gen(context.mT)  # (B, C, K²)
        # Lateral inhibition, Eq. 9, on the K² numbers of each kernel.
        mean = kernels.mean(-1, keepdim=True)
        kernels = torch.addcmul(kernels, self.inhibition.sigmoid().unsqueeze(-1), mean, value=-1)
        return kernels.unflatten(-1, (self.kernel_size, self.kernel_size))

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: value and output projections, kernel generation, and the convolution."""
        N, C, taps = grid[0] * grid[1], self.dim, self.kernel_size**2
        return 2 * (2 * N * C**2 + taps * C**2 + C * taps**2 + N * C * taps)

    def _pool(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Average tokens (B, N, C) over K² bins: (B, K², C). Bins overlap if K does not divide the grid."""
        K = self.kernel_size
        if self.pool == "grid":
            return pool_tokens(x, grid, (K, K))
        return pool_tokens(x, (x.shape[1], 1), (K * K, 1))
