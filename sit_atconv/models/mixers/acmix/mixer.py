"""ACmix: attention and convolution on the same queries, keys and values (Pan et al. 2022, arXiv 2111.14556)."""

import torch
from torch import Tensor, nn

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.models.mixers.acmix.neighbourhood import NeighbourhoodAttention
from sit_atconv.models.mixers.acmix.shifts import SHIFT_MODULES, ShiftedSum
from sit_atconv.models.mixers.attention import Attention
from sit_atconv.models.mixers.local_attention.groups import windows
from sit_atconv.models.mixers.local_attention.window import Window
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
        require_one_of(shift_module, SHIFT_MODULES, "shift_module")
        require_one_of(rates, RATES, "rates")
        self.window, self.shift, self.rates = window, shift, rates
        self.attention = _attention(dim, num_heads, neighbourhood, window, shift)
        self.convolution = ShiftedSum(dim, num_heads, bias=not neighbourhood, shift_module=shift_module)
        self.alpha = None if rates == "fixed" else nn.Parameter(torch.full((1,), 0.5))
        self.beta = nn.Parameter(torch.full((1,), 0.5)) if rates == "free" else None

    def initialise(self) -> None:
        """Let the learned kernels of the convolution path start as shifts, after any initialisation by the model."""
        self.convolution.initialise()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        qkv = self.attention.qkv(x)
        attention = self.attention.out_proj(self.attention.mix(qkv, grid))
        return self._sum(attention, self._convolution(qkv, grid))

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image, those for padding and hidden keys included."""
        return self.attention.flops(grid) + self.convolution.flops(grid)

    def _convolution(self, qkv: Tensor, grid: tuple[int, int]) -> Tensor:
        """The convolution path on the map as windows shift it: (B, N, 3C) -> (B, N, C)."""
        maps = qkv.unflatten(1, grid)
        if not self.shift:
            return self.convolution(maps).flatten(1, 2)
        rows, columns = windows(grid, self.window, self.shift).shifts
        y = self.convolution(torch.roll(maps, (-rows, -columns), (1, 2)))
        return torch.roll(y, (rows, columns), (1, 2)).flatten(1, 2)

    def _sum(self, attention: Tensor, convolution: Tensor) -> Tensor:
        """Eq. 13 with the rates of Table 6, in the dtype of the paths."""
        if self.rates == "fixed":
            return attention + convolution
        weighted = self.alpha * attention
        if self.rates == "alpha":
            return (weighted + convolution).to(attention.dtype)
        beta = self.beta if self.rates == "free" else 1 - self.alpha
        return (weighted + beta * convolution).to(attention.dtype)


def _attention(dim: int, num_heads: int, neighbourhood: int, window: int, shift: int) -> nn.Module:
    """The attention path: `qkv`, `mix`, `out_proj` and `flops`."""
    if neighbourhood and window:
        raise InputError(
            f"ACmix attends within neighbourhoods or within windows, not both: neighbourhood is {neighbourhood}, "
            f"window {window}. Set one of them to 0."
        )
    if window:
        return Window(dim, num_heads, window, shift)
    if shift:
        raise InputError(f"shift is for windows, and there are none: set window to more than {shift}, or shift to 0.")
    return NeighbourhoodAttention(dim, num_heads, neighbourhood) if neighbourhood else Attention(dim, num_heads)
