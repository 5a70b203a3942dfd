"""Adaptive average pooling of tokens: bin i of K over a length L averages ⌊iL/K⌋ … ⌈(i+1)L/K⌉ (torch's bins)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sit_atconv.ops.precision import accumulation_dtype


def pool_tokens(x: Tensor, grid: tuple[int, int], bins: tuple[int, int], backend: str = "auto") -> Tensor:
    """Average tokens over bins that overlap where they do not divide the grid.

    Args:
        x: (B, N, C), N = H·W in raster order.
        grid: (H, W).
        bins: how many along height and width.
        backend: "reduction" (torch's), "product" (with a matrix of bins: it is as fast as the memory on a GPU, where
            torch's gradient adds in no fixed order; and compilers make one program of it for every grid), or "auto":
            the product on a GPU and for compilers, else the reduction.

    Returns:
        (B, bins, C), raster order, of x's dtype (of autocast's for the product).
    """
    if backend == "auto":
        backend = "product" if x.is_cuda or torch.compiler.is_compiling() else "reduction"
    if backend == "reduction":
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)  # a channels-last view
        # Flattened and then transposed, one sample's gradient counts as channels first, and takes ten times as long.
        return F.adaptive_avg_pool2d(image, bins).permute(0, 2, 3, 1).flatten(1, 2)
    rows, columns = (_membership(length, count, x.device) for length, count in zip(grid, bins, strict=True))
    members = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (bins, N)
    # In short dtypes a weight 1/n is rounded and a sum of n tokens may overflow. A power of two near 1/n does neither;
    # what is left of n divides the few sums.
    count = members.sum(1, keepdim=True, dtype=accumulation_dtype(x.dtype))
    share = torch.exp2(-torch.floor(torch.log2(count)))
    weights = (members * share).to(x.dtype).expand(x.shape[0], -1, -1)
    sums = torch.bmm(weights, x)  # matmul would transpose the tokens to fold the batch into one product
    return (sums / (count * share)).to(sums.dtype)


def _membership(length: int, count: int, device: torch.device) -> Tensor:
    """Which of `length` positions each of `count` bins averages: (count, length), bool."""
    position, number = torch.arange(length, device=device), torch.arange(count, device=device)[:, None]
    return (position >= number * length // count) & (position * count < (number + 1) * length)
