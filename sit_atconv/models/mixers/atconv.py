"""Attentive Convolution (ATConv): a depthwise convolution with kernels generated from the image (arXiv 2510.20092)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sit_atconv.errors import require_one_of
from sit_atconv.models.mixers.convolutions.depthwise import require_odd
from sit_atconv.models.mixers.registry import register_mixer
from sit_atconv.ops import per_sample_depthwise_conv2d, pool_tokens

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}
POOLS = ("grid", "raster")
KERNELS = ("generated", "static")
INHIBITIONS = ("dkm", "none", "softmax", "difference")


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
        kernels, value, out, inhibition: the paper's ablation (Table IX c), from a depthwise convolution to ATConv.
            kernels: "generated", or "static", learnt like those of any convolution, with a bias. value, out: whether
            the values and the result are projected. inhibition: "dkm" (Eq. 9), "none", "softmax" over each kernel, or
            "difference", which subtracts the kernel's sum from its centre, so that constants are not seen.

    Raises:
        InputError: for an even kernel size or an unknown value of another option.
    """

    matrices = {"kernel_gen": 0}

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        pool: str = "grid",
        activation: str = "gelu",
        kernels: str = "generated",
        value: bool = True,
        out: bool = True,
        inhibition: str = "dkm",
    ) -> None:
        super().__init__()
        require_odd(kernel_size)
        require_one_of(pool, POOLS, "pool")
        require_one_of(activation, ACTIVATIONS, "activation")
        require_one_of(kernels, KERNELS, "kind of kernels")
        require_one_of(inhibition, INHIBITIONS, "inhibition")
        self.dim, self.kernel_size, self.pool, self.activation = dim, kernel_size, pool, activation
        self.generated, self.projections, self.inhibited_by = kernels == "generated", value + out, inhibition
        if self.generated:
            self.kernel_proj = nn.Linear(dim, dim)
            self.kernel_gen = nn.Linear(kernel_size**2, kernel_size**2)  # shared by all channels
        else:
            self.conv = nn.Conv2d(dim, dim, kernel_size, groups=dim)  # holds kernels and bias, and is not called
        self.value_proj = nn.Linear(dim, dim) if value else nn.Identity()
        self.out_proj = nn.Linear(dim, dim) if out else nn.Identity()
        if inhibition == "dkm":
            self.inhibition = nn.Parameter(torch.zeros(dim))  # λ = sigmoid(0) = ½ at the start

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        values = self.value_proj(x).view(B, *grid, C)
        y = per_sample_depthwise_conv2d(values, self.kernels(x, grid).to(values.dtype))
        if not self.generated:
            y = y + self.conv.bias.to(y.dtype)
        return self.out_proj(y.reshape(B, N, C))

    def kernels(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The kernels α of Eq. 9 for tokens x (B, N, C): (B, C, K, K)."""
        kernels = self._generate(x, grid) if self.generated else self.conv.weight.flatten(1).expand(len(x), -1, -1)
        return self._inhibit(kernels).unflatten(-1, (self.kernel_size, self.kernel_size))

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: value and output projections, kernel generation, and the convolution."""
        N, C, taps = grid[0] * grid[1], self.dim, self.kernel_size**2
        generation = self.generated * (taps * C**2 + C * taps**2)
        return 2 * (self.projections * N * C**2 + generation + N * C * taps)

    def _generate(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Context to kernel, Eq. 7-8, for tokens x (B, N, C): (B, C, K²)."""
        # The paper projects N tokens and pools them into K²; we pool first. Pooling is linear and its weights sum to 1,
        # so the result is the same, and the projection costs K² tokens instead of N.
        context = ACTIVATIONS[self.activation](self.kernel_proj(self._pool(x, grid)))  # (B, K², C)
        return self.kernel_gen(context.mT)

    def _pool(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Average tokens (B, N, C) over K² bins: (B, K², C). Bins overlap if K does not divide the grid."""
        K = self.kernel_size
        if self.pool == "grid":
            return pool_tokens(x, grid, (K, K))
        return pool_tokens(x, (x.shape[1], 1), (K * K, 1))

    def _inhibit(self, kernels: Tensor) -> Tensor:
        """Lateral inhibition among the K² numbers of each kernel (B, C, K²)."""
        if self.inhibited_by == "dkm":  # Eq. 9
            mean = kernels.mean(-1, keepdim=True)
            return torch.addcmul(kernels, self.inhibition.sigmoid().unsqueeze(-1), mean, value=-1)
        if self.inhibited_by == "softmax":
            return kernels.softmax(-1)
        if self.inhibited_by == "difference":
            around = kernels.shape[-1] // 2
            return kernels - F.pad(kernels.sum(-1, keepdim=True), (around, around))
        return kernels
