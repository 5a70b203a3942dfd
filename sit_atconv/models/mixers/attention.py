"""Multi-head self-attention over all tokens, DiT's and SiT's mixer (Vaswani et al. 2017, arXiv 1706.03762, Eq. 1)."""

from torch import Tensor, nn

from sit_atconv.models.mixers.attend import Attend, merge_heads, require_heads, split_heads
from sit_atconv.models.mixers.queries import prepare, require_rotatable
from sit_atconv.models.mixers.registry import register_mixer
from sit_atconv.models.norms import head_norm


@register_mixer("attention")
class Attention(nn.Module):
    """Scaled dot-product self-attention: (B, N, C), grid (H, W) -> (B, N, C).

    Args:
        dim, num_heads: width C and heads h, d = C/h.
        qk_norm: whether queries and keys are normed over the d channels of a head (`head_norm`).
        rope: whether they are then turned by their row and column (`grid_angles`); otherwise the grid is not used.
        block_norm: the kind of the blocks' norms, which qk-norm takes.

    Raises:
        InputError: when `num_heads` does not divide `dim`, or when rope is on and d is no multiple of 4.
    """

    matrices = {"qkv": 3}

    def __init__(
        self, dim: int, num_heads: int, qk_norm: bool = False, rope: bool = False, block_norm: str = "layer"
    ) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        if rope:
            require_rotatable(dim, num_heads)
        self.dim, self.num_heads, self.rope = dim, num_heads, rope
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.attend = Attend()
        self.q_norm, self.k_norm = (head_norm(block_norm, dim // num_heads) if qk_norm else None for _ in range(2))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.out_proj(self.mix(self.qkv(x), grid))

    def mix(self, qkv: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention without the projections: q, k, v (B, N, 3C) -> (B, N, C)."""
        # Views of one tensor: their gradients are written into it in one pass
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        places = grid if self.rope else None
        q, k = prepare(q, self.q_norm, places), prepare(k, self.k_norm, places)
        return merge_heads(self.attend(q, k, v))

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: four projections, the scores, and the weighted sum of the values."""
        N, C = grid[0] * grid[1], self.dim
        return 2 * (4 * N * C**2 + 2 * N**2 * C)
