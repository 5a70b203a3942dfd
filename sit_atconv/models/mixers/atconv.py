"""Attentive Convolution (ATConv): a depthwise convolution whose kernels are made from the image (arXiv 2510.20092)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.models.layers import Linear, is_wrapped
from sit_atconv.ops import per_sample_depthwise_conv2d, pool_tokens

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}
POOLS = ("grid", "raster")


class ATConv(nn.Module):
    """Mix tokens with one K×K kernel per image and channel: (B, N, C), grid (H, W) -> (B, N, C), any H, W >= 1.

    The kernels come from the image's K×K average-pooled context (Eq. 7-8); lateral inhibition subtracts from each a
    learnt share of its mean (Eq. 9); they then run over the projected values (Eq. 10-11).

    Args:
        dim: width C.
        kernel_size: K, odd.
        pool: "grid" pools over (H, W) as the paper does; "raster" pools the flattened sequence into K² runs, as the
            authors' released code does.
        activation: φ of Eq. 8: "gelu" (the paper), "gelu_tanh" or "silu" (the two released trees).

    Raises:
        InputError: for an even kernel size or an unknown pool or activation.
    """

    def __init__(self, dim: int, kernel_size: int = 3, pool: str = "grid", activation: str = "gelu") -> None:
        super().__init__()
        require_one_of(pool, POOLS, "pool")
        require_one_of(activation, ACTIVATIONS, "activation")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be odd and positive, not {kernel_size}: an even kernel has no centre.")
        self.kernel_size, self.pool, self.activation = kernel_size, pool, activation
        self.kernel_proj = Linear(dim, dim)
        self.kernel_gen = Linear(kernel_size**2, kernel_size**2)  # shared by all channels
        self.value_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)
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
        context = self.kernel_proj(self._pool(x, grid))  # (B, K², C)
        kernels = self._generate(ACTIVATIONS[self.activation](context))
        return kernels.transpose(1, 2).unflatten(-1, (self.kernel_size, self.kernel_size))

    def _generate(self, context: Tensor) -> Tensor:
        """α (B, K², C) from φ of the context (B, K², C), channels last as the convolution reads them (Eq. 8-9).

        Lateral inhibition takes from a channel's numbers λ times their mean. It is folded into the generator's product:
        a row more, the sum of the others, gives the sum of the numbers.
        """
        size, generator = self.kernel_size**2, self.kernel_gen
        if is_wrapped(generator):
            kernels = generator(context.mT).mT
            total = kernels.sum(1, keepdim=True)
        else:
            weight = torch.cat([generator.weight, generator.weight.sum(0, keepdim=True)])
            bias = torch.cat([generator.bias, generator.bias.sum(0, keepdim=True)])
            product = torch.baddbmm(bias.unsqueeze(-1), weight.expand(context.shape[0], -1, -1), context)
            kernels, total = product.split((size, 1), dim=1)
        return torch.addcmul(kernels, self.inhibition.sigmoid(), total, value=-1 / size)

    def _pool(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Average tokens (B, N, C) over K² bins: (B, K², C). Bins overlap where K does not divide the grid."""
        K = self.kernel_size
        if self.pool == "grid":
            return pool_tokens(x, grid, (K, K))
        return pool_tokens(x, (x.shape[1], 1), (K * K, 1))
