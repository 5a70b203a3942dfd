"""Rank-augmented linear attention, RALA (Fan et al. 2025, arXiv 2411.07635)."""

import torch
from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.models.mixers.attend import merge_heads, require_heads, split_heads
from sit_atconv.models.mixers.convolutions.depthwise import DepthwiseConv
from sit_atconv.models.mixers.registry import register_mixer
from sit_atconv.models.mixers.rotary import rotate_pairs
from sit_atconv.ops.precision import accumulation_dtype, without_autocast

EPSILON = 1e-6


@register_mixer("rankaug")
class RankAugmented(nn.Module):
    """Linear attention whose keys are weighted and whose output is gated: (B, N, C), grid (H, W) -> (B, N, C).

    With q and k after elu + 1, per head: keys are weighted by a = softmax_j(d^-½ q̄·k_j), q̄ the mean of q; then
    y_i = rot(q_i)ᵀ Σ_j a_j rot(k_j) v_jᵀ / (q_iᵀ Σ_j a_j k_j + ε), where rot is a rotary embedding of row and column.
    y += a depthwise 5×5 convolution of v; the result is multiplied by o, a fourth projection of x, and projected. The
    paper's factors N and 1/N of a and of the sums cancel. 5C² + 31C parameters; any H, W >= 1.

    Raises:
        InputError: when `num_heads` does not divide `dim`, or when C/h is not a multiple of 4.
    """

    matrices = {"qkvo": 4}

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        if dim // num_heads % 4:
            raise InputError(
                f"Each of the {num_heads} heads has {dim // num_heads} of {dim} channels; a rotary embedding of row "
                "and column needs a multiple of 4."
            )
        self.dim, self.num_heads = dim, num_heads
        self.qkvo = nn.Linear(dim, 4 * dim)
        self.depthwise = DepthwiseConv(dim, 5)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        *qkv, o = self.qkvo(x).chunk(4, dim=-1)
        y = merge_heads(rank_augmented_attention(*(split_heads(part, self.num_heads) for part in qkv), grid))
        return self.out_proj((y + self.depthwise(qkv[-1], grid)) * o)

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: five projections, two products with d×d matrices and two with d, convolution."""
        N, C, d = grid[0] * grid[1], self.dim, self.dim // self.num_heads
        return 2 * (5 * N * C**2 + 2 * N * C * d + 2 * N * C + 25 * N * C)


def rank_augmented_attention(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    """y of `RankAugmented` for heads q, k, v (B, h, N, d) before elu + 1, in v's dtype; summed in fp32."""
    d = q.shape[-1]
    wide = accumulation_dtype(v.dtype)
    with without_autocast(v.device):
        q, k = (positive(part.to(wide)) for part in (q, k))
        scores = k @ q.mean(-2).unsqueeze(-1)  # (B, h, N, 1)
        k = k * torch.softmax(d**-0.5 * scores, dim=-2)
        total = q @ k.sum(-2).unsqueeze(-1)  # (B, h, N, 1)
        angles = grid_angles(grid, d // 4, q)
        S = rotate_pairs(k, angles).mT @ v.to(wide)  # (B, h, d, d)
        return (rotate_pairs(q, angles) @ S / (total + EPSILON)).to(v.dtype)


def positive(x: Tensor) -> Tensor:
    """elu(x) + 1. For the gradient of torch's own ELU, compilers expect a layout that it does not have."""
    return x.clamp(max=0).exp() + x.relu()


def grid_angles(grid: tuple[int, int], count: int, like: Tensor) -> Tensor:
    """Angles of N tokens, `count` by their row and `count` by their column: (N, 2·count), frequencies 1 to 1/10000.

    They have the device and dtype of `like`.
    """
    frequencies = 10000 ** -torch.linspace(0, 1, count, device=like.device, dtype=like.dtype)
    rows, columns = (torch.arange(length, device=like.device)[:, None] * frequencies for length in grid)
    H, W = grid
    by_row, by_column = rows[:, None].expand(H, W, count), columns[None].expand(H, W, count)
    return torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
