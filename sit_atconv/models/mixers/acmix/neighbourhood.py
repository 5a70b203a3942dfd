"""Attention of every position to the k×k positions around it, computed in tiles."""

import torch
from einops import rearrange
from torch import Tensor, nn

from sit_atconv.models.mixers.attend import Attend

# Side of a tile of queries. Measured on a CPU at 32×32, C = 384, k = 7, with gradients: 4: 90 ms, 8: 57, 11: 65, 16: 83.
TILE = 8


class NeighbourhoodAttention(nn.Module):
    """Softmax attention within k×k neighbourhoods, with relative coordinates: q, k, v (B, H, W, C) -> (B, H, W, C).

    Per head, the score of a position and its neighbour is d^-½ qᵀ(k_nb + P(here) − P(nb)) (the release's form of Eq. 21
    of arXiv 2111.14556). P maps the coordinates of a position, (column, row) in [−1, 1], to d channels; all heads share
    it.

    Neighbours beyond the border are those that a mirror at the border row or column shows (reflect padding), so some
    positions count twice. On sides of at most ⌊k/2⌋ positions, where torch has no reflect padding, the positions are
    mirrored repeatedly: 0, 1, 2, 1, 0, 1, …; the only position of a side of 1 is all its neighbours.

    No neighbourhood is copied: tiles of up to 8×8 queries attend to all keys of their neighbourhoods, and a mask hides
    those outside a query's own. P(here) is the same for all neighbours of a query, so the softmax does not depend on
    it, and P(nb) is subtracted from the keys.
    """

    def __init__(self, dim: int, num_heads: int, size: int) -> None:
        super().__init__()
        self.dim, self.num_heads, self.reach = dim, num_heads, size // 2
        self.position = nn.Linear(2, dim // num_heads)  # P; its bias cancels, and is kept for released weights
        self.attend = Attend()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, H, W, _ = q.shape
        k = (k.unflatten(-1, (self.num_heads, -1)) - self._positions(k).unsqueeze(2)).flatten(-2)
        (rows, height), (columns, width) = tiling(H), tiling(W)

        def cut(x: Tensor, reach: int) -> Tensor:
            """Tiles of a map with the positions up to `reach` around them: (B·tiles, h, positions, d)."""
            x = x.index_select(1, _covered(H, reach, x.device)).index_select(2, _covered(W, reach, x.device))
            return rearrange(x, "b (r i) (c j) (n d) -> (b r c) n (i j) d", r=rows, c=columns, n=self.num_heads)

        y = self.attend(cut(q, 0), cut(k, self.reach), cut(v, self.reach), self._mask(height, width, q))
        return rearrange(y, "(b r c) n (i j) d -> b (r i) (c j) (n d)", r=rows, c=columns, i=height)[:, :H, :W]

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image, those for hidden keys included: the neighbourhoods need 4·N·k²·C of them."""
        queries = keys = tiles = 1
        for length in grid:
            count, side = tiling(length)
            tiles, queries, keys = tiles * count, queries * side, keys * (side + 2 * self.reach)
        return 2 * (2 * tiles * queries * keys * self.dim + 2 * grid[0] * grid[1] * self.position.out_features)

    def _positions(self, like: Tensor) -> Tensor:
        """P of all coordinates: (H, W, d)."""
        _, H, W, _ = like.shape
        y, x = (torch.linspace(-1, 1, length, dtype=like.dtype, device=like.device) for length in (H, W))
        return self.position(torch.stack([x.expand(H, W), y.unsqueeze(1).expand(H, W)], dim=-1))

    def _mask(self, height: int, width: int, like: Tensor) -> Tensor:
        """0 where a query of a tile has a key in its neighbourhood, −∞ elsewhere: (queries, keys)."""
        rows, columns = (self._near(side, like.device) for side in (height, width))
        near = rearrange(rows, "i k -> i 1 k 1") & rearrange(columns, "j l -> 1 j 1 l")
        hidden = rearrange(~near, "i j k l -> (i j) (k l)")
        return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, -torch.inf)

    def _near(self, side: int, device: torch.device) -> Tensor:
        """Which positions covered by a tile are near each of its queries, along one axis: (side, side + 2·reach)."""
        query = torch.arange(side, device=device).unsqueeze(1) + self.reach
        return (torch.arange(side + 2 * self.reach, device=device) - query).abs() <= self.reach


def tiling(length: int) -> tuple[int, int]:
    """Into how many tiles an axis is cut, and their length: together they cover the axis."""
    tiles = -(-length // TILE)
    return tiles, -(-length // tiles)


def _covered(length: int, reach: int, device: torch.device) -> Tensor:
    """The positions of an axis that each of its tiles covers with `reach` more on both sides, one tile after another."""
    tiles, side = tiling(length)
    starts = side * torch.arange(tiles, device=device).unsqueeze(1) - reach
    return mirrored(starts + torch.arange(side + 2 * reach, device=device), length).flatten()


def mirrored(positions: Tensor, length: int) -> Tensor:
    """Positions reflected at 0 and at `length` − 1, as often as needed, into [0, length)."""
    period = max(2 * (length - 1), 1)
    positions = positions.abs() % period
    return torch.minimum(positions, period - positions)
