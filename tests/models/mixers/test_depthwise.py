"""The static depthwise convolution of tokens is torch's, with torch's weights."""

import pytest
import torch
import torch.nn.functional as F
from mixer_truth import GRIDS

from sit_atconv.models.mixers.depthwise import Depthwise


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_it_is_torchs_convolution(grid: tuple[int, int], kernel_size: int) -> None:
    convolution = Depthwise(4, kernel_size).double()
    x = torch.randn(3, grid[0] * grid[1], 4, dtype=torch.float64, requires_grad=True)
    image = x.transpose(1, 2).unflatten(2, grid)
    y = F.conv2d(image, convolution.weight, convolution.bias, padding=kernel_size // 2, groups=4)
    pair = [convolution(x, grid), y.flatten(2).transpose(1, 2)]
    torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-11)
    wanted = (x, *convolution.parameters())
    gradients = [torch.autograd.grad(each.square().sum(), wanted) for each in pair]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)
