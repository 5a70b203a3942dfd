"""What the tests of single mixers share: a comparison with a literal transcription, and operations written as loops."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]
GRIDS = [(4, 4), (2, 6), (5, 3), (1, 1)]  # square, rectangular, odd, and a single token


def randomised(mixer: nn.Module) -> nn.Module:
    """The mixer in fp64, every parameter random."""
    mixer = mixer.double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer


def assert_same_function(
    mixer: nn.Module, literal: Callable[[nn.Module, Tensor, Grid], Tensor], grid: Grid, dim: int
) -> None:
    """Outputs and the gradients of tokens and of all parameters agree to 1e-10 in fp64."""
    x = torch.randn(2, grid[0] * grid[1], dim, dtype=torch.float64, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    pair = mixer(x, grid), literal(mixer, x, grid)
    weights = torch.randn_like(pair[0])
    gradients = [torch.autograd.grad((y * weights).sum(), wanted, materialize_grads=True) for y in pair]
    for found, expected in zip((pair[0], *gradients[0]), (pair[1], *gradients[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """x Wᵀ + b."""
    return torch.einsum("...i,oi->...o", x, layer.weight) + layer.bias


def convolution(x: Tensor, weight: Tensor, bias: Tensor, grid: Grid) -> Tensor:
    """y[o, h, w] = bias[o] + Σ_iuv weight[o, i, u, v] · x[i, h+u−p, w+v−p], zeros outside: x (B, N, C), raster order.

    A weight (C, 1, K, K) is that of a depthwise convolution.
    """
    (H, W), K = grid, weight.shape[-1]
    p = K // 2
    image = F.pad(x.unflatten(1, grid), (0, 0, p, p, p, p))
    y = bias.expand(len(x), H, W, -1)
    for u in range(K):
        for v in range(K):
            window = image[:, u : u + H, v : v + W]
            if weight.shape[1] == 1:
                y = y + window * weight[:, 0, u, v]
            else:
                y = y + torch.einsum("bhwi,oi->bhwo", window, weight[:, :, u, v])
    return y.flatten(1, 2)


def parameters(mixer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in mixer.parameters())
