"""What is done to teacher tokens before they are compared."""

import torch.nn.functional as F
from torch import Tensor


def resample_tokens(tokens: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Tokens (B, h·w, D) of the grid `source` (h, w) for another grid, bilinearly; unchanged for the same one."""
    if tuple(source) == tuple(target):
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, tuple(source))
    return F.interpolate(maps, tuple(target), mode="bilinear").flatten(2).transpose(1, 2)


def normalise_spatially(tokens: Tensor, eps: float = 1e-6) -> Tensor:
    """Every channel of tokens (B, N, D) with mean 0 and variance 1 over the tokens of a picture, in fp32.

    iREPA's (arXiv 2512.10794, with γ = 1: all of the mean goes): what all tokens of a picture have in common drowns how
    they differ.
    """
    tokens = tokens.float()
    centred = tokens - tokens.mean(1, keepdim=True)
    return centred * (centred.square().mean(1, keepdim=True) + eps).rsqrt()
