"""Attention on interleaved coarse grids (U-DiT, Tian et al. 2024, arXiv 2405.02730)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.models.mixers.attend import Attend, require_heads
from sit_atconv.models.mixers.convolutions.depthwise import DepthwiseConv
from sit_atconv.models.mixers.local_attention.groups import Groups, phases, score_mask
from sit_atconv.models.mixers.registry import register_mixer
from sit_atconv.models.mixers.rotary import rotate_pairs
from sit_atconv.ops.precision import accumulation_dtype

LOGITS = ("cosine", "dot")
LARGEST_SCALE = math.log(100)


@register_mixer("strided")
class Strided(nn.Module):
    """Attention among every r-th row and column: (B, N, C), grid (H, W) -> (B, N, C), any H, W >= 1.

    u = x + dwconv(x), and q, k, v = Linear(u). Token (i, j) attends to the tokens of its phase (i mod r, j mod r): the
    downsampled self-attention of the paper, whose results stay at the places of the queries. A projection follows.

    Scores are e^min(ℓ, ln 100) · q̂·k̂ with vectors of length 1 and a learnt ℓ for each head ("cosine"), or q·k / √d
    ("dot"). Before that, rotary embedding turns the channels (4m, 4m+1) by c·f_m and (4m+2, 4m+3) by r·f_m for a token
    in row r and column c of its phase, f_m = 10000^(−4m/d). On grids that r does not divide, phases are padded, and the
    padding is masked. Forward-mode derivatives need `SiT.set_attention_backend("_native_math")`.

    Args:
        dim, num_heads: width C and heads h of d = C/h channels, d a multiple of 4.
        stride: r.
        kernel_size: side of the depthwise convolution, odd.
        logits: "cosine" or "dot".

    Raises:
        InputError: for a width that does not split into heads of a multiple of 4 channels, or an option out of range.
    """

    matrices = {"qkv": 3}

    def __init__(self, dim: int, num_heads: int, stride: int = 2, kernel_size: int = 5, logits: str = "cosine") -> None:
        super().__init__()
        require_heads(dim, num_heads)
        require_one_of(logits, LOGITS, "logits")
        if dim // num_heads % 4:
            raise InputError(f"Rotary embedding needs heads of a multiple of 4 channels, not {dim // num_heads}.")
        if stride < 1:
            raise InputError(f"stride must be positive, not {stride}.")
        self.dim, self.num_heads, self.stride = dim, num_heads, stride
        self.conv = DepthwiseConv(dim, kernel_size)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.full((num_heads,), math.log(10))) if logits == "cosine" else None
        self.attend = Attend()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        groups = phases(grid, self.stride)
        qkv = self.qkv(x + self.conv(x, grid))
        q, k, v = groups.cut(groups.roll(qkv), self.num_heads, parts=3)  # (B, r²·h, T, d)
        # Angles and lengths in fp32: in 16 bits a position beyond 256 has no angle of its own
        angles = self._angles(groups, accumulation_dtype(q.dtype), q.device)
        q, k = (rotate_pairs(part.to(angles.dtype), angles) for part in (q, k))
        scale = None
        if self.logit_scale is not None:
            q, k, scale = F.normalize(q, dim=-1), F.normalize(k, dim=-1), 1.0
            q = q * self.logit_scale.clamp(max=LARGEST_SCALE).exp().repeat(groups.count)[:, None, None]
        mask = score_mask(groups.count, self.num_heads, groups.sees(x.device))
        y = self.attend(q.to(v.dtype), k.to(v.dtype), v, mask, scale)
        return self.out_proj(groups.join(y, self.num_heads))

    def _angles(self, groups: Groups, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The angle of each pair of channels for each token of a phase: (T, d/2)."""
        d = self.dim // self.num_heads
        rows, columns = (torch.arange(length, dtype=dtype, device=device) for length in groups.inner)
        frequencies = 10_000.0 ** (-4 / d * torch.arange(d // 4, dtype=dtype, device=device))
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1).flatten(0, 1)  # (T, 2): c, r
        return (places[:, None] * frequencies[:, None]).flatten(1)

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: the convolution, four projections, scores and weighted sums with their padding."""
        N, C = grid[0] * grid[1], self.dim
        taps = self.conv.weight[0, 0].numel()
        return 2 * (4 * N * C**2 + taps * N * C + 2 * phases(grid, self.stride).pairs * C)
