"""Multi-head self-attention over all tokens, DiT's and SiT's mixer (Vaswani et al. 2017, arXiv 1706.03762, Eq. 1)."""

from typing import ClassVar

from torch import Tensor, nn

from sit_atconv.models.mixers.attend import Attend, merge_heads, require_heads, split_heads
from sit_atconv.models.mixers.registry import register_mixer


@register_mixer("attention")
class Attention(nn.Module):
    """Scaled dot-product self-attention: (B, N, C), grid (H, W) -> (B, N, C). It does not use the grid.

    Raises `InputError` when `num_heads` does not divide `dim`.
    """

    matrices: ClassVar = {"qkv": 3}

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.attend = Attend()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.out_proj(self.mix(self.qkv(x), grid))

    def mix(self, qkv: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention without the projections: q, k, v (B, N, 3C) -> (B, N, C)."""
        # Views of one tensor: their gradients are written into it in one pass
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        return merge_heads(self.attend(q, k, v))

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: four projections, the scores, and the weighted sum of the values."""
        N, C = grid[0] * grid[1], self.dim
        return 2 * (4 * N * C**2 + 2 * N**2 * C)
