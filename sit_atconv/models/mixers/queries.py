"""What may happen to attention's queries and keys before their products: qk-norm, then RoPE for two axes."""

import torch
from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.models.mixers.rotary import rotate_pairs
from sit_atconv.ops.precision import accumulation_dtype

_THETA = 10_000.0


def prepare(x: Tensor, norm: nn.Module | None, grid: tuple[int, int] | None) -> Tensor:
    """Norm the heads x (B, h, T, d) of queries or keys, and rotate them by their places in `grid`; None for neither."""
    dtype = x.dtype
    if norm is not None:
        x = norm(x.to(norm.weight.dtype))  # which autocast does not change
    if grid is not None:
        wide = x.to(accumulation_dtype(x.dtype))  # in 16 bits large angles have no digits left
        x = rotate_pairs(wide, grid_angles(grid, x.shape[-1], wide))
    return x.to(dtype)


def grid_angles(grid: tuple[int, int], width: int, like: Tensor) -> Tensor:
    """Angles in radians of the T tokens of `grid` (H, W) for heads of d = `width` channels: (T, d/2).

    The first half turns the first half of the channels by the row r, the other by the column c: r·f_i and c·f_i with
    f_i = 10000^(−4i/d), i < d/4, as LightningDiT (arXiv 2501.01423) and EVA-02 do. Rows and columns are whole numbers
    for any grid. Device and dtype are those of `like`.
    """
    options = {"device": like.device, "dtype": like.dtype}
    frequencies = _THETA ** (-4 / width * torch.arange(width // 4, **options))
    by_row, by_column = (torch.arange(length, **options)[:, None] * frequencies for length in grid)
    H, W = grid
    both = by_row[:, None].expand(H, W, -1), by_column[None].expand(H, W, -1)
    return torch.cat(both, dim=-1).flatten(0, 1)


def require_rotatable(dim: int, num_heads: int) -> None:
    """Raise `InputError` unless each head has channels for the sine and cosine of a row and of a column."""
    if dim // num_heads % 4:
        raise InputError(
            f"rope turns pairs of channels by row and by column, and each of the {num_heads} heads has "
            f"{dim // num_heads} of {dim} channels: choose a number of heads that leaves a multiple of 4, or no rope."
        )
