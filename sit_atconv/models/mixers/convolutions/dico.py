"""DiCo's mixer: a depthwise convolution with a channel gate (Ai et al. 2025, arXiv 2505.11196)."""

import torch.nn.functional as F
from torch import Tensor, nn

from sit_atconv.models.mixers.convolutions.depthwise import DepthwiseConv
from sit_atconv.models.mixers.registry import register_mixer


@register_mixer("dico")
class DiCo(nn.Module):
    """Convolution and compact channel attention: (B, N, C), grid (H, W) -> (B, N, C), any H, W >= 1.

    u = GELU(dw3(Linear x)) with the exact GELU, and y = Linear(u ⊙ σ(Linear(mean of u over positions))): the gate is
    the same for all tokens of an image.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.in_proj = nn.Linear(dim, dim)
        self.conv = DepthwiseConv(dim, 3)
        self.gate = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        u = F.gelu(self.conv(self.in_proj(x), grid))
        gate = self.gate(u.mean(1, keepdim=True)).sigmoid()
        return self.out_proj(u * gate)

    def initialise(self) -> None:
        """As released: the convolution is Xavier-uniform, which counts C outputs, so that its kernels start small."""
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: two projections, the convolution and the gate's projection."""
        N, C = grid[0] * grid[1], self.dim
        return 2 * (2 * N * C**2 + 9 * N * C + C**2)
