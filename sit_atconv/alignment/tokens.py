"""Preprocessing of teacher tokens before the alignment loss."""

import torch.nn.functional as F
from torch import Tensor


def resample_tokens(tokens: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Resample tokens (B, h·w, D) from the grid `source` (h, w) to another, bilinearly; unchanged for the same grid."""
    if tuple(source) == tuple(target):
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, tuple(source))
    return F.interpolate(maps, tuple(target), mode="bilinear").flatten(2).transpose(1, 2)


def normalise_spatially(tokens: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise every channel of tokens (B, N, D) to mean 0 and variance 1 over the tokens of an image, in fp32.

    As in iREPA (arXiv 2512.10794, with γ = 1, which removes the whole mean): the component that all tokens of an image
    share would hide their differences.
    """
    tokens = tokens.float()
    centred = tokens - tokens.mean(1, keepdim=True)
    return centred * (centred.square().mean(1, keepdim=True) + eps).rsqrt()
