"""How a mixer is compared with a literal transcription of its paper: values and all gradients, in fp64."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

GRIDS = [(4, 4), (2, 6), (5, 3), (1, 1)]

Literal = Callable[[nn.Module, Tensor, tuple[int, int]], Tensor]


def randomised(mixer: nn.Module) -> nn.Module:
    """The mixer in fp64 with large random weights, so that no term of its formula is negligible."""
    mixer = mixer.double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer


def assert_same(mixer: nn.Module, literal: Literal, grid: tuple[int, int], dim: int, tolerance: float = 1e-10) -> None:
    """`mixer` and `literal(mixer, x, grid)` agree in values and in the gradients of x and of every parameter."""
    x = torch.randn(2, grid[0] * grid[1], dim, dtype=torch.float64, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    ours, theirs = mixer(x, grid), literal(mixer, x, grid)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weights).sum(), wanted) for y in (ours, theirs)]
    for a, b in zip((ours, *gradients[0]), (theirs, *gradients[1]), strict=True):
        assert (a - b).norm() <= tolerance * max(b.norm().item(), 1.0)


def literal_depthwise(x: Tensor, kernels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Convolve tokens x (B, N, C) with kernels (B, C, K, K), one position and tap after the other, zeros outside."""
    (H, W), K = grid, kernels.shape[-1]
    image, p = x.unflatten(1, grid), K // 2
    rows = []
    for h in range(H):
        for w in range(W):
            y = torch.zeros_like(image[:, 0, 0])
            for u in range(K):
                for v in range(K):
                    if 0 <= h + u - p < H and 0 <= w + v - p < W:
                        y = y + kernels[:, :, u, v] * image[:, h + u - p, w + v - p]
            rows.append(y)
    return torch.stack(rows, dim=1)


def parameters(mixer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in mixer.parameters())
