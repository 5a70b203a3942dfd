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
        bins: number of bins along height and width.
        backend: "reduction" (torch's pooling), "product" (a matrix product with bin weights), or "auto": the product on
            a GPU and under compilation, else the reduction. On a GPU the product runs at memory speed, while the
            gradient of torch's pooling is not deterministic; compiled, it serves every grid with one program.

    Returns:
        (B, bins, C) in raster order and x's dtype (autocast's dtype for the product).
    """
    if backend == "auto":
        backend = "product" if x.is_cuda or torch.compiler.is_compiling() else "reduction"
    if backend == "reduction":
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)  # a channels-last view
        # Were this flattened before the permutation, the gradient of a single sample would be channels first and slow
        # (ten times).
        return F.adaptive_avg_pool2d(image, bins).permute(0, 2, 3, 1).flatten(1, 2)
    rows, columns = (_membership(length, count, x.device) for length, count in zip(grid, bins, strict=True))
    members = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (bins, N)
    # In 16 bits a weight 1/n is rounded, and a sum of n tokens may overflow. Weights that are a power of two near 1/n
    # avoid both; the few sums are then divided by the remaining factor.
    count = members.sum(1, keepdim=True, dtype=accumulation_dtype(x.dtype))
    share = torch.exp2(-torch.floor(torch.log2(count)))
    weights = (members * share).to(x.dtype).expand(x.shape[0], -1, -1)
    sums = torch.bmm(weights, x)  # matmul would transpose the tokens to fold the batch into one product
    return (sums / (count * share)).to(sums.dtype)


def _membership(length: int, count: int, device: torch.device) -> Tensor:
    """Which of `length` positions each of `count` bins averages: (count, length), bool."""
    position, number = torch.arange(length, device=device), torch.arange(count, device=device)[:, None]
    return (position >= number * length // count) & (position * count < (number + 1) * length)
