"""Attention of every position to the k×k positions around it, computed in tiles."""

import torch
from einops import rearrange
from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.models.mixers.attend import Attend, require_heads

# Longest side of a tile of queries. With gradients, at 32×32, C = 384, k = 7, on one thread of an AMD EPYC: 66 ms with
# tiles of 4, 57 with 8, 68 with 11 and 16, 170 with a single one, and 713 with copies of all neighbourhoods.
TILE = 8


class NeighbourhoodAttention(nn.Module):
    """Softmax attention within k×k neighbourhoods, with relative coordinates, without an output projection.

    Per head, the score of a position and its neighbour is d^-½ qᵀ(k_nb + P(here) − P(nb)) (arXiv 2111.14556, Eq. 21, in
    the form of the release). P maps coordinates, (column, row) in [−1, 1], to d channels; all heads share it.

    Neighbours beyond the border are mirrored at the outermost rows and columns, as in torch's reflect padding; so some
    positions count twice. Sides of at most ⌊k/2⌋ positions, for which torch has no such padding, are mirrored
    repeatedly: 0, 1, 2, 1, 0, 1, …; on a side of 1 all neighbours are the one position.

    No neighbourhood is copied: tiles of up to 8×8 queries attend to all keys of their neighbourhoods, and a mask hides
    those outside a query's own. P(here) is the same for all neighbours of a query, so that the softmax does not depend
    on it, and P(nb) is subtracted from the keys.

    Raises `InputError` when `num_heads` does not divide `dim`, or for an even k.
    """

    matrices = {"qkv": 3, "position": 0}

    def __init__(self, dim: int, num_heads: int, size: int) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        if size < 1 or size % 2 == 0:
            raise InputError(f"The side of a neighbourhood must be odd and positive, not {size}.")
        self.dim, self.num_heads, self.reach = dim, num_heads, size // 2
        self.qkv = nn.Linear(dim, 3 * dim)
        self.position = nn.Linear(2, dim // num_heads)  # P; its bias cancels, and is there for released weights
        self.attend = Attend()
        self.out_proj = nn.Identity()

    def mix(self, qkv: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention without the projections: q, k, v (B, N, 3C) -> (B, N, C)."""
        q, k, v = qkv.unflatten(1, grid).chunk(3, dim=-1)
        k = (k.unflatten(-1, (self.num_heads, -1)) - self._positions(k).unsqueeze(2)).flatten(-2)
        (H, W), ((rows, height), (columns, width)) = grid, map(tiling, grid)

        def cut(x: Tensor, reach: int) -> Tensor:
            """Tiles of a map with the positions up to `reach` around them: (B·tiles, h, positions, d)."""
            x = x.index_select(1, _covered(H, reach, x.device)).index_select(2, _covered(W, reach, x.device))
            return rearrange(x, "b (r i) (c j) (n d) -> (b r c) n (i j) d", r=rows, c=columns, n=self.num_heads)

        y = self.attend(cut(q, 0), cut(k, self.reach), cut(v, self.reach), self._mask(height, width, q))
        y = rearrange(y, "(b r c) n (i j) d -> b (r i) (c j) (n d)", r=rows, c=columns, i=height)
        return y[:, :H, :W].flatten(1, 2)

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: q, k, v, coordinates, and attention to the keys of tiles.

        Keys that are hidden from a query count, too: attention to the neighbourhoods alone has 4·N·k²·C operations.
        """
        N, C, pairs = grid[0] * grid[1], self.dim, 1
        for tiles, side in map(tiling, grid):
            pairs *= tiles * side * (side + 2 * self.reach)
        return 2 * (3 * N * C**2 + 2 * N * self.position.out_features + 2 * pairs * C)

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
    """The positions that tiles of an axis cover with `reach` more on both sides, one tile after another."""
    tiles, side = tiling(length)
    starts = side * torch.arange(tiles, device=device).unsqueeze(1) - reach
    return mirrored(starts + torch.arange(side + 2 * reach, device=device), length).flatten()


def mirrored(positions: Tensor, length: int) -> Tensor:
    """Positions reflected at 0 and at `length` − 1, as often as needed, into [0, length)."""
    period = max(2 * (length - 1), 1)
    positions = positions.abs() % period
    return torch.minimum(positions, period - positions)
