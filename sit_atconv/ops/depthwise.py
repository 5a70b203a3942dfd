"""Depthwise convolution with one kernel per sample and channel (ATConv, arXiv 2510.20092, Eq. 11)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sit_atconv.errors import InputError, require_one_of


def _grouped_convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """One image of B·C channels, each its own group."""
    B, H, W, C = x.shape
    K = kernels.shape[-1]
    image = x.permute(0, 3, 1, 2).reshape(1, B * C, H, W)
    y = F.conv2d(image, kernels.reshape(B * C, 1, K, K), padding=K // 2, groups=B * C)
    return y.view(B, C, H, W).permute(0, 2, 3, 1)


def _shifted_sums(x: Tensor, kernels: Tensor) -> Tensor:
    """K² shifted multiply-adds, channels last throughout: a compiler fuses them into one pass over x."""
    _, H, W, _ = x.shape
    K = kernels.shape[-1]
    p = K // 2
    padded = F.pad(x, (0, 0, p, p, p, p))
    taps = kernels.flatten(2).unbind(-1)  # K² times (B, C)
    windows = (padded[:, u : u + H, v : v + W] for u in range(K) for v in range(K))
    return sum(window * tap[:, None, None, :] for window, tap in zip(windows, taps, strict=True))


BACKENDS = {"grouped": _grouped_convolution, "shifted": _shifted_sums}


def per_sample_depthwise_conv2d(x: Tensor, kernels: Tensor, backend: str = "auto") -> Tensor:
    """Convolve every channel of every sample with its own K×K kernel, zero padding ⌊K/2⌋, stride 1.

    As in all deep-learning libraries this is a cross-correlation: y[h, w] = Σ_uv kernel[u, v] · x[h+u−p, w+v−p].

    Args:
        x: (B, H, W, C), any floating dtype.
        kernels: (B, C, K, K), K odd, of x's dtype.
        backend: "grouped" (torch's grouped convolution), "shifted" (K² multiply-adds), or "auto": shifted sums where
            torch.compile can fuse them, the grouped convolution in eager mode, where unfused sums take twice its time.

    Returns:
        (B, H, W, C).

    Raises:
        InputError: for shapes that do not belong together, an even K or an unknown backend.
    """
    require_one_of(backend, ["auto", *BACKENDS], "backend")
    B, C = x.shape[0], x.shape[-1]
    K = kernels.shape[-1]
    if x.ndim != 4 or kernels.shape != (B, C, K, K) or K % 2 == 0:
        raise InputError(
            f"x of shape {tuple(x.shape)} and kernels of shape {tuple(kernels.shape)} do not belong together: "
            "expected (B, H, W, C) and (B, C, K, K) with K odd."
        )
    if backend == "auto":
        backend = "shifted" if torch.compiler.is_compiling() else "grouped"
    return BACKENDS[backend](x, kernels)
