"""Embeddings of position and time, as in DiT (Peebles & Xie 2022)."""

import math

import torch
from torch import Tensor

TIME_FEATURES = 256


def sincos_position(dim: int, grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Fixed 2-D sine-cosine position embedding (He et al. 2021, MAE): float32 of shape (H·W, dim), raster order.

    The first half of the channels encodes the column x, the second the row y; each half holds the sines of all
    frequencies 10000^(−2k/(dim/2)), then the cosines. `dim` is a multiple of 4.
    """
    H, W = grid
    frequencies = 10000.0 ** -torch.linspace(0, 1, dim // 4 + 1, dtype=torch.float64, device=device)[:-1]
    rows, columns = torch.meshgrid(
        torch.arange(H, dtype=torch.float64, device=device),
        torch.arange(W, dtype=torch.float64, device=device),
        indexing="ij",
    )
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]  # two of (H·W, dim/4)
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


def time_features(t: Tensor, features: int = TIME_FEATURES) -> Tensor:
    """Fourier features of times t (B,) in [0, 1]: (B, features), cosines then sines of ω_k·t.

    ω_k = exp(−ln(10000)·k/(features/2)); t is not scaled by 1000. Computed in t's precision, at least fp32.
    """
    t = t if t.dtype == torch.float64 else t.float()
    k = torch.arange(features // 2, dtype=t.dtype, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(10000.0) * k / (features // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)
