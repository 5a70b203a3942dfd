"""The kernels' gradient as an operation of its own: that of the convolution itself, differentiable like it."""

from functools import partial

import pytest
import torch
from operator_truth import random_arguments, unfolded_convolution
from torch import Tensor

from sit_atconv.ops import depthwise_kernel_gradient
from sit_atconv.ops.precision import without_autocast

SHAPES = [(2, 4, 4, 3), (1, 5, 2, 2), (3, 1, 1, 2), (2, 6, 1, 1)]


def by_autograd(x: Tensor, dy: Tensor, K: int) -> Tensor:
    kernels = torch.randn(len(x), x.shape[-1], K, K, dtype=x.dtype, requires_grad=True)  # any
    return torch.autograd.grad(unfolded_convolution(x, kernels), kernels, dy)[0]


@pytest.mark.parametrize("K", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_gradient_of_the_definition(shape: tuple[int, ...], K: int) -> None:
    x, dy = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(depthwise_kernel_gradient(x, dy, K), by_autograd(x, dy, K), rtol=1e-11, atol=1e-11)


def test_no_samples_have_no_gradients() -> None:
    assert depthwise_kernel_gradient(torch.randn(0, 3, 3, 2), torch.randn(0, 3, 3, 2), 3).shape == (0, 2, 3, 3)


def test_its_own_derivatives() -> None:
    x, _ = random_arguments(2, 3, 4, 2, 3)
    dy, _ = random_arguments(2, 3, 4, 2, 3)
    function = partial(depthwise_kernel_gradient, kernel_size=3)
    assert torch.autograd.gradcheck(function, (x, dy), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, dy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_summed_in_fp32_and_stay_so(dtype: torch.dtype) -> None:
    x, dy = (30 * torch.randn(2, 1, 64, 64, 4)).to(dtype)  # in fp16 the sums would overflow
    found = depthwise_kernel_gradient(x, x + dy, 3)
    assert found.dtype == torch.float32
    exact = depthwise_kernel_gradient(x.double(), (x + dy).double(), 3)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.mark.slow
def test_compiled_for_varying_grids() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(partial(depthwise_kernel_gradient, kernel_size=3), fullgraph=True, dynamic=True)
    for shape in ((2, 4, 5, 6), (3, 5, 3, 6)):
        x, dy = (torch.randn(shape, requires_grad=True) for _ in range(2))
        pair = [function(x, dy) for function in (compiled, partial(depthwise_kernel_gradient, kernel_size=3))]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
        gradients = [torch.autograd.grad(y.square().sum(), (x, dy)) for y in pair]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_products_without_autocast_keep_their_dtype(device: str) -> None:
    x = torch.ones(2, 2, device=device)
    with torch.autocast("cpu", torch.bfloat16), without_autocast(x.device):
        assert (x @ x).dtype == torch.float32
