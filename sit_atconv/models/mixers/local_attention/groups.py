"""A map of tokens cut into groups that attend among themselves, for any grid: windows, and the phases of a stride.

The map is padded at the bottom and right to whole groups. Two tokens of a group see each other if their *bins* are the
same along both axes. Padding has a bin of its own, so that it sees itself and no row of a softmax is empty.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Pair = tuple[int, int]


@dataclass(frozen=True)
class Groups:
    """How a grid (H, W) is cut into G groups of T tokens.

    Args:
        grid: (H, W).
        steps: the grid is padded to multiples of these.
        shifts: by how many rows and columns the map is rolled up and to the left before it is cut.
        strided: whether a group is a phase, every steps-th row and column, rather than a window of that size.
    """

    grid: Pair
    steps: Pair
    shifts: Pair = (0, 0)
    strided: bool = False

    @property
    def padded(self) -> Pair:
        """(H', W'), the grid with its padding."""
        # The case without padding is one of its own: a compiler need not carry formulas of padded sizes through it
        return tuple(
            length if length % step == 0 else (length // step + 1) * step
            for length, step in zip(self.grid, self.steps, strict=True)
        )

    @property
    def inner(self) -> Pair:
        """Rows and columns of one group, T = rows · columns."""
        if not self.strided:
            return self.steps
        return tuple(length // step for length, step in zip(self.padded, self.steps, strict=True))

    @property
    def count(self) -> int:
        """G."""
        (H, W), (rows, columns) = self.padded, self.inner
        return (H // rows) * (W // columns)

    @property
    def pairs(self) -> int:
        """Pairs of tokens for which attention computes a score: N' · T."""
        (H, W), (rows, columns) = self.padded, self.inner
        return H * W * rows * columns

    def roll(self, x: Tensor) -> Tensor:
        """Pad tokens (B, N, C) with zeros and roll their map: (B, H', W', C)."""
        image = x.unflatten(1, self.grid)
        below, right = (whole - length for whole, length in zip(self.padded, self.grid, strict=True))
        if below or right:
            image = F.pad(image, (0, 0, 0, right, 0, below))
        return torch.roll(image, (-self.shifts[0], -self.shifts[1]), (1, 2)) if any(self.shifts) else image

    def cut(self, image: Tensor, heads: int = 1, parts: int = 1) -> Tensor:
        """Cut a rolled map (B, H', W', parts·h·d) into groups: (parts, B, G·h, T, d), in one copy.

        Groups are folded into heads, not into the batch, so that one mask serves all samples.
        """
        rows, columns = self.inner
        image_axes = "b (i u) (j v) (p n d)" if self.strided else "b (u i) (v j) (p n d)"
        return rearrange(image, f"{image_axes} -> p b (u v n) (i j) d", i=rows, j=columns, p=parts, n=heads)

    def join(self, y: Tensor, heads: int = 1) -> Tensor:
        """The inverse of `cut` and `roll`: (B, G·h, T, d) to tokens (B, N, h·d) without the padding."""
        rows, columns = self.inner
        image_axes = "b (i u) (j v) (n d)" if self.strided else "b (u i) (v j) (n d)"
        u = self.padded[0] // rows
        image = rearrange(y, f"b (u v n) (i j) d -> {image_axes}", i=rows, j=columns, u=u, n=heads)
        if any(self.shifts):
            image = torch.roll(image, self.shifts, (1, 2))
        return image[:, : self.grid[0], : self.grid[1]].flatten(1, 2)

    def sees(self, device: torch.device) -> Tensor | None:
        """Which tokens of a group see each other: bool (G, T, T), or None if all do."""
        if self.padded == self.grid and not any(self.shifts):
            return None
        rows, columns = (self._bins(axis, device) for axis in (0, 1))
        bins = rows[:, None] * (self.padded[1] + 2) + columns  # one number for the pair of bins
        bins = torch.roll(bins, (-self.shifts[0], -self.shifts[1]), (0, 1))
        bins = self.cut(bins[None, :, :, None])[0, 0, :, :, 0]
        return bins[:, :, None] == bins[:, None, :]

    def _bins(self, axis: int, device: torch.device) -> Tensor:
        """The bin of each position along an axis: floor((i − shift) / step), or all the same for phases."""
        position = torch.arange(self.padded[axis], device=device)
        if self.strided:
            return (position >= self.grid[axis]).long()
        bins = (position - self.shifts[axis]).div(self.steps[axis], rounding_mode="floor")
        return bins.masked_fill(position >= self.grid[axis], self.padded[axis])


def windows(grid: Pair, side: int, shift: int = 0) -> Groups:
    """Windows of side × side tokens. Along an axis that is not longer, there is one window and no shift."""
    return Groups(
        grid,
        steps=tuple(min(side, length) for length in grid),
        shifts=tuple(shift if length > side else 0 for length in grid),
    )


def phases(grid: Pair, stride: int) -> Groups:
    """stride² groups: token (i, j) belongs to the group (i mod stride, j mod stride)."""
    return Groups(grid, steps=(stride, stride), strided=True)


class RelativeBias(nn.Module):
    """A learnt number for each head and each offset between two tokens of a window (Swin, arXiv 2103.14030, Eq. 4).

    Args:
        side: side w of the window; smaller windows use the middle of the table.
        num_heads: h; the table is ((2w − 1)², h).
    """

    def __init__(self, side: int, num_heads: int) -> None:
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.empty((2 * side - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, inner: Pair) -> Tensor:
        """Numbers for a window of `inner` rows and columns: (h, T, T), query first."""
        rows, columns = (torch.arange(length, device=self.table.device) for length in inner)
        position = (rows[:, None] * (2 * self.side - 1) + columns).flatten()
        centre = (len(self.table) - 1) // 2  # the row of the offset (0, 0)
        return self.table[position[:, None] - position + centre].permute(2, 0, 1)


def score_mask(groups: int, heads: int, sees: Tensor | None = None, bias: Tensor | None = None) -> Tensor | None:
    """The mask (1, G·h, T, T) of `Attend` for `sees` (G, T, T) and a bias (h, T, T) of the scores; None for neither."""
    if bias is not None:
        mask = bias.expand(groups, *bias.shape)
        mask = mask if sees is None else mask.masked_fill(~sees[:, None], -torch.inf)
    elif sees is not None:
        mask = sees[:, None].expand(-1, heads, -1, -1)
    else:
        return None
    return mask.flatten(0, 1)[None]
