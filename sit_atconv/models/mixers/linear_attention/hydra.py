"""Hydra attention: linear attention with as many heads as channels (Bolya et al. 2022, arXiv 2209.07484)."""

import torch.nn.functional as F
from torch import Tensor, nn

from sit_atconv.models.mixers.registry import register_mixer
from sit_atconv.ops.precision import accumulation_dtype


@register_mixer("hydra")
class Hydra(nn.Module):
    """y = q ⊙ Σ_j k_j ⊙ v_j, q and k of length 1 over all channels: (B, N, C), grid (H, W) -> (B, N, C).

    This is linear attention with the cosine similarity as kernel. All tokens share one sum of C numbers; positions do
    not matter, and the grid is not used. Lengths and sums are in fp32. 4C² + 4C parameters.
    """

    matrices = {"qkv": 3}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        wide = accumulation_dtype(q.dtype)
        q, k = (F.normalize(part.to(wide), dim=-1) for part in (q, k))
        y = q * (k * v.to(wide)).sum(1, keepdim=True)
        return self.out_proj(y.to(v.dtype))

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: four projections."""
        return 2 * 4 * grid[0] * grid[1] * self.dim**2
