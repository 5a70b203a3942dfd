"""ACmix: attention and convolution on the same queries, keys and values (Pan et al. 2022, arXiv 2111.14556)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.models.mixers.acmix.neighbourhood import NeighbourhoodAttention
from sit_atconv.models.mixers.acmix.shifts import SHIFT_MODULES, ShiftedSum
from sit_atconv.models.mixers.attend import Attend
from sit_atconv.models.mixers.local_attention.groups import (
    Groups,
    RelativeBias,
    attend_within,
    require_heads,
    windows,
)
from sit_atconv.models.mixers.registry import register_mixer

RATES = ("free", "tied", "alpha", "fixed")


@register_mixer("acmix")
class ACmix(nn.Module):
    """F = α·F_att + β·F_conv (Eq. 13): (B, N, C), grid (H, W) -> (B, N, C), any H, W >= 1.

    Both paths read the same projections q, k, v. `ShiftedSum` is the convolution path. The attention path is one of

    * *global* (Eq. 20), the default: softmax attention over all tokens, then a projection;
    * *windowed* (Eq. 19, the released Swin): within windows of `window` × `window` tokens that may be shifted, with a
      learnt number for each offset, then a projection. The convolution works on the cyclically shifted map, in which
      opposite borders are neighbours, as in the release; it is not projected;
    * *local* (Eq. 21, the released ResNet): within the `neighbourhood` × `neighbourhood` positions around each, with
      relative coordinates; no projection, and no bias where maps are mixed.

    Channels of the convolution path are in the order of the release (see `ShiftedSum`): `convert_acmix` turns released
    weights into a state of this class. α and β start as ½. Forward-mode derivatives need
    `SiT.set_attention_backend("_native_math")`.

    Args:
        dim, num_heads: width C and heads h, d = C/h.
        neighbourhood: side k_a of the neighbourhoods, odd, 7 in the release; 0 for another form.
        window: side of the windows, 7 in the release; 0 for another form.
        shift: of the windows, in [0, window).
        shift_module: a row of Table 7: "learned", "random", "fixed" or "tensor" (see `ShiftedSum`).
        rates: a row of Table 6 (α, β): "free" (both are learnt), "tied" (α, 1 − α), "alpha" (α, 1) or "fixed" (1, 1).

    Raises:
        InputError: when `num_heads` does not divide `dim`, or for an option that is not allowed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        neighbourhood: int = 0,
        window: int = 0,
        shift: int = 0,
        shift_module: str = "learned",
        rates: str = "free",
    ) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        _require_form(neighbourhood, window, shift)
        require_one_of(shift_module, SHIFT_MODULES, "shift_module")
        require_one_of(rates, RATES, "rates")
        self.dim, self.num_heads, self.window, self.shift, self.rates = dim, num_heads, window, shift, rates
        self.qkv = nn.Linear(dim, 3 * dim)
        self.convolution = ShiftedSum(dim, num_heads, bias=not neighbourhood, shift_module=shift_module)
        self.neighbourhood = NeighbourhoodAttention(dim, num_heads, neighbourhood) if neighbourhood else None
        self.attend = None if neighbourhood else Attend()
        self.relative_bias = RelativeBias(window, num_heads) if window else None
        self.out_proj = None if neighbourhood else nn.Linear(dim, dim)
        self.alpha = None if rates == "fixed" else nn.Parameter(torch.full((1,), 0.5))
        self.beta = nn.Parameter(torch.full((1,), 0.5)) if rates == "free" else None

    def initialise(self) -> None:
        """Let the learned kernels of the convolution path start as shifts, after any initialisation by the model."""
        self.convolution.initialise()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        qkv = self.qkv(x)
        if self.neighbourhood is not None:
            maps = qkv.unflatten(1, grid)
            attention = self.neighbourhood(*maps.chunk(3, dim=-1)).flatten(1, 2)
            convolution = self.convolution(maps).flatten(1, 2)
        else:
            attention = self.out_proj(self._attention(qkv, grid))
            convolution = self._shifted_convolution(qkv, grid)
        return self._sum(attention, convolution)

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: projections, attention with padding and hidden keys, and the convolution path."""
        N, C = grid[0] * grid[1], self.dim
        if self.neighbourhood is not None:
            attention = 2 * 3 * N * C**2 + self.neighbourhood.flops(grid)
        else:
            attention = 2 * (4 * N * C**2 + 2 * self._windows(grid).pairs * C)
        return attention + self.convolution.flops(grid)

    def _windows(self, grid: tuple[int, int]) -> Groups:
        """The windows of a grid: a single one if attention is global."""
        return windows(grid, self.window or max(grid), self.shift)

    def _attention(self, qkv: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention within windows, (B, N, 3C) -> (B, N, C)."""
        groups = self._windows(grid)
        heads = "b g t (three h d) -> three b g h t d"
        q, k, v = rearrange(groups.cut(groups.roll(qkv)), heads, three=3, h=self.num_heads)
        bias = None if self.relative_bias is None else self.relative_bias(groups.inner)
        return groups.join(attend_within(self.attend, q, k, v, groups.sees(qkv.device), bias))

    def _shifted_convolution(self, qkv: Tensor, grid: tuple[int, int]) -> Tensor:
        """The convolution path on the map as the windows shift it, (B, N, 3C) -> (B, N, C)."""
        down, right = self._windows(grid).shifts
        maps = qkv.unflatten(1, grid)
        if not (down or right):
            return self.convolution(maps).flatten(1, 2)
        y = self.convolution(torch.roll(maps, (-down, -right), (1, 2)))
        return torch.roll(y, (down, right), (1, 2)).flatten(1, 2)

    def _sum(self, attention: Tensor, convolution: Tensor) -> Tensor:
        """Eq. 13 with the rates of Table 6, in the dtype of the paths."""
        if self.rates == "fixed":
            return attention + convolution
        weighted = self.alpha * attention
        if self.rates == "alpha":
            return (weighted + convolution).to(attention.dtype)
        beta = self.beta if self.rates == "free" else 1 - self.alpha
        return (weighted + beta * convolution).to(attention.dtype)


def _require_form(neighbourhood: int, window: int, shift: int) -> None:
    if neighbourhood < 0 or (neighbourhood and neighbourhood % 2 == 0):
        raise InputError(f"neighbourhood must be odd, or 0 for another form, not {neighbourhood}.")
    if neighbourhood and window:
        raise InputError(
            f"ACmix attends within neighbourhoods or within windows, not both: neighbourhood is {neighbourhood}, "
            f"window {window}. Set one of them to 0."
        )
    if window < 0 or not 0 <= shift < max(window, 1):
        raise InputError(
            f"window must be positive, or 0 for another form, and shift at least 0 and less than window, not window "
            f"{window}, shift {shift}."
        )
