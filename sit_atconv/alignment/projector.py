"""Projectors from hidden tokens to the width of a teacher: trained with the model, but not part of it."""

from torch import Tensor, nn


class Projector(nn.Module):
    """Linear, SiLU, Linear, SiLU, Linear (REPA): tokens (B, N, dim) -> (B, N, teacher_dim)."""

    def __init__(self, dim: int, teacher_dim: int, hidden: int = 2048) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, teacher_dim),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


class ConvProjector(nn.Module):
    """One 3×3 convolution over the token `grid` (h, w) (iREPA): tokens (B, h·w, dim) -> (B, h·w, teacher_dim)."""

    def __init__(self, dim: int, teacher_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.conv = tuple(grid), nn.Conv2d(dim, teacher_dim, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        maps = tokens.transpose(1, 2).unflatten(2, self.grid)
        return self.conv(maps).flatten(2).transpose(1, 2)
