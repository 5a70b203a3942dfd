"""The per-sample depthwise convolution from its definition, for the tests of its backends."""

import torch
import torch.nn.functional as F
from torch import Tensor


def unfolded_convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """x (B, H, W, C) cut into all its windows, each summed with its sample's and channel's kernel (B, C, K, K)."""
    B, H, W, C = x.shape
    K = kernels.shape[-1]
    windows = F.unfold(x.permute(0, 3, 1, 2), K, padding=K // 2).view(B, C, K * K, H, W)
    return torch.einsum("bcthw,bct->bhwc", windows, kernels.flatten(2))


def random_arguments(B: int, H: int, W: int, C: int, K: int, dtype: torch.dtype = torch.float64) -> tuple:
    """Leaves x (B, H, W, C) and kernels (B, C, K, K) that want gradients."""
    x = torch.randn(B, H, W, C, dtype=torch.float64).to(dtype).requires_grad_()
    return x, torch.randn(B, C, K, K, dtype=torch.float64).to(dtype).requires_grad_()


def value_and_gradients(function, x: Tensor, kernels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the gradients of Σ weights · y with respect to x and the kernels."""
    y = function(x, kernels)
    return y.detach(), *torch.autograd.grad((y * weights.to(y.dtype)).sum(), (x, kernels))


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Each within `tolerance` of the norm of what is expected."""
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()
