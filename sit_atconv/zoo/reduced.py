"""PVT's attention to a reduced map (arXiv 2102.12122), and ACmix on its queries, keys and values (arXiv 2111.14556)."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from sit_atconv.zoo.acmix import ImageShiftedSum


class ReducedAttention(nn.Module):
    """Attention of all tokens to a map that a convolution has made R times smaller: (B, N, C) -> (B, N, C).

    N is H·W, or for R = 1 may be more: tokens before those of the map are attended to as the others.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int) -> None:
        super().__init__()
        self.num_heads, self.reduction = num_heads, reduction
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else nn.Identity()
        self.norm = nn.LayerNorm(dim) if reduction > 1 else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        kv = self.kv(self.seen(x, grid))
        return self.proj(self.attend(self.q(x), kv))

    def seen(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The tokens that are attended to: (B, M, C)."""
        if self.reduction == 1:
            return x
        image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], grid[0], grid[1])
        return self.norm(self.sr(image).flatten(2).transpose(1, 2))

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """q (B, N, C), k and v (B, M, 2C) -> (B, N, C)."""
        batch, tokens, dim = q.shape
        q = q.reshape(batch, tokens, self.num_heads, -1).transpose(1, 2)
        parts = kv.reshape(batch, kv.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, parts[0], parts[1]).transpose(1, 2).reshape(batch, tokens, dim)


@register_notrace_module
class ReducedACmix(nn.Module):
    """α·attention + β·convolution on the same q, k, v: (B, N, C), grid (H, W) -> (B, N, C), N >= H·W.

    The release has no PVT; this is the form whose parameters and operations fit the paper's (docs/zoo.md): k and v of
    the reduced map are interpolated to the map for the convolution. Tokens before those of the map take no part in it.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int) -> None:
        super().__init__()
        self.attention = ReducedAttention(dim, num_heads, reduction)
        self.convolution = ImageShiftedSum(dim, num_heads, bias=False)
        self.alpha, self.beta = nn.Parameter(torch.full((1,), 0.5)), nn.Parameter(torch.full((1,), 0.5))

    def initialise(self) -> None:
        """Let the kernels of the convolution start as shifts."""
        self.convolution.initialise()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, kv = self.attention.q(x), self.attention.kv(self.attention.seen(x, grid))
        attention = self.alpha * self.attention.proj(self.attention.attend(q, kv))
        extra = x.shape[1] - grid[0] * grid[1]
        maps = torch.cat([q[:, extra:].unflatten(1, grid), self._at_full_size(kv, grid, extra)], -1)
        convolution = self.beta * self.convolution(maps).flatten(1, 2)
        return torch.cat([attention[:, :extra], attention[:, extra:] + convolution], 1)

    def _at_full_size(self, kv: Tensor, grid: tuple[int, int], extra: int) -> Tensor:
        """k and v (B, M, 2C) on the map: (B, H, W, 2C)."""
        reduction = self.attention.reduction
        if reduction == 1:
            return kv[:, extra:].unflatten(1, grid)
        image = kv.unflatten(1, (grid[0] // reduction, grid[1] // reduction)).permute(0, 3, 1, 2)
        return F.interpolate(image, grid, mode="bilinear").permute(0, 2, 3, 1)
