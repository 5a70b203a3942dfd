"""Several mixers side by side, their results summed."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from sit_atconv.models.mixers.registry import mixer_flops


class Parallel(nn.Module):
    """y = Σ_m s_m · mixer_m(x): (B, N, C), grid (H, W) -> (B, N, C).

    The scales s, one number for each mixer, are learnt and start at 1/M, so that the sum of M mixers starts as their
    mean (ACmix's α and β, arXiv 2111.14556, are two such numbers). A scale for each channel could say no more: a mixer
    that ends in a projection has one already in its rows, and a block's gate is one for the sum. Single numbers tell
    how much each mixer contributes, block by block.

    Built by an entry ``{parallel: [attention, atconv]}`` of a pattern.
    """

    def __init__(self, dim: int, mixers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.dim = dim
        self.mixers = nn.ModuleList(mixers)
        self.scales = nn.Parameter(torch.full((len(mixers),), 1 / len(mixers)))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        parts = [scale * mixer(x, grid) for scale, mixer in zip(self.scales.unbind(), self.mixers, strict=True)]
        return reduce(torch.add, parts)

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations of all mixers for one image."""
        return sum(mixer_flops(mixer, grid, self.dim) for mixer in self.mixers)

    def initialise(self) -> None:
        """As each mixer initialises itself."""
        for mixer in self.mixers:
            if hasattr(mixer, "initialise"):
                mixer.initialise()

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise `InputError` for a training grid that one of the mixers does not support."""
        for mixer in self.mixers:
            if hasattr(mixer, "check_grid"):
                mixer.check_grid(grid)
