"""Rotation of pairs of channels by angles that depend on a token's place (RoPE, arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Turn channels (2p, 2p + 1) of tokens x (..., T, d) by angles (T, d/2) in radians."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
