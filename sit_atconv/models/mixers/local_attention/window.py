"""Attention within windows that may be shifted (Swin Transformer, Liu et al. 2021, arXiv 2103.14030)."""

from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.models.mixers.attend import Attend, require_heads
from sit_atconv.models.mixers.local_attention.groups import RelativeBias, score_mask, windows
from sit_atconv.models.mixers.queries import prepare, require_rotatable
from sit_atconv.models.mixers.registry import register_mixer
from sit_atconv.models.norms import head_norm


@register_mixer("window")
class Window(nn.Module):
    """Attention within windows of w × w tokens: (B, N, C), grid (H, W) -> (B, N, C), any H, W >= 1.

    Along an axis, token i is in the window ⌊(i − shift) / w⌋; the axis has one window if it is not longer than w.
    Per head, y = softmax(q·kᵀ / √d + b) v over the tokens of the window (Eq. 4), then a projection. b is learnt for
    each offset between two tokens. On grids that w divides this is Swin's attention; other grids are padded, and the
    padding and the opposite borders, which a shifted window brings together, are masked.

    Swin alternates the shifts 0 and ⌊w/2⌋: ``[window, {name: window, shift: 4}]``. Forward-mode derivatives need
    `SiT.set_attention_backend("_native_math")`.

    Args:
        dim, num_heads: width C and heads h.
        window: side w.
        shift: in [0, w).
        relative_bias: whether there is b.
        qk_norm: whether queries and keys are normed over the channels of a head (`head_norm`).
        rope: whether they are then turned by their row and column in the window; scores depend on offsets alone.
        block_norm: the kind of the blocks' norms, which qk-norm takes.

    Raises:
        InputError: when `num_heads` does not divide `dim`, for a window or shift out of range, or when rope is on and
            heads have no multiple of 4 channels.
    """

    matrices = {"qkv": 3}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int = 8,
        shift: int = 0,
        relative_bias: bool = True,
        qk_norm: bool = False,
        rope: bool = False,
        block_norm: str = "layer",
    ) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        if window < 1 or not 0 <= shift < window:
            raise InputError(
                f"window must be positive, and shift at least 0 and less than window, not window {window}, "
                f"shift {shift}."
            )
        if rope:
            require_rotatable(dim, num_heads)
        self.dim, self.num_heads, self.window, self.shift, self.rope = dim, num_heads, window, shift, rope
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.bias = RelativeBias(window, num_heads) if relative_bias else None
        self.attend = Attend()
        self.q_norm, self.k_norm = (head_norm(block_norm, dim // num_heads) if qk_norm else None for _ in range(2))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.out_proj(self.mix(self.qkv(x), grid))  # projected before padding

    def mix(self, qkv: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention without the projections: q, k, v (B, N, 3C) -> (B, N, C)."""
        groups = windows(grid, self.window, self.shift)
        q, k, v = groups.cut(groups.roll(qkv), self.num_heads, parts=3)
        places = groups.inner if self.rope else None
        q, k = prepare(q, self.q_norm, places), prepare(k, self.k_norm, places)
        bias = None if self.bias is None else self.bias(groups.inner).to(q.dtype)
        mask = score_mask(groups.count, self.num_heads, groups.sees(qkv.device), bias)
        return groups.join(self.attend(q, k, v, mask), self.num_heads)

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: four projections, scores and weighted sums, padding included."""
        N, C = grid[0] * grid[1], self.dim
        return 2 * (4 * N * C**2 + 2 * windows(grid, self.window).pairs * C)
