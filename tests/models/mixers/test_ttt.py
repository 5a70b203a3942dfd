"""ViT³'s layer against its definition (arXiv 2512.01643): its step is taken by autograd on the loss itself."""

import pytest
import torch
import torch.nn.functional as F
from mixer_truths import GRIDS, assert_same_function, parameters, per_sample_convolution, randomised
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.models.mixers import TTT


def literal(mixer: TTT, x: Tensor, grid: tuple[int, int]) -> Tensor:
    C, d, N = mixer.dim, mixer.dim // mixer.num_heads, x.shape[1]
    parts = mixer.qkv(x)
    q, k, v = parts[..., :C], parts[..., C : 2 * C], parts[..., 2 * C : 3 * C]
    q_, k_, v_ = parts[..., 3 * C :].chunk(3, dim=-1)

    def glu(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return (x @ w1) * F.silu(x @ w2)

    def convolution(x: Tensor, w: Tensor) -> Tensor:
        return per_sample_convolution(x, w[None], grid)

    def loss(predicted: Tensor, values: Tensor) -> Tensor:
        return -(predicted * values).sum(-1).mean(-1).sum() / 3

    def step(w: Tensor, gradient: Tensor, axes: tuple[int, ...]) -> Tensor:
        return w - gradient / (gradient.square().sum(axes, keepdim=True).sqrt() + 1)

    samples = []
    for b in range(len(x)):
        heads = []
        for h in range(mixer.num_heads):
            here = slice(h * d, (h + 1) * d)
            weights = [mixer.w1[h], mixer.w2[h]]
            fitted = loss(glu(k[b, :, here], *weights), v[b, :, here])
            gradients = torch.autograd.grad(fitted, weights, create_graph=True)
            heads.append(glu(q[b, :, here], *(step(w, g, (0,)) for w, g in zip(weights, gradients, strict=True))))
        fitted = loss(convolution(k_[b : b + 1], mixer.w), v_[b : b + 1])
        (gradient,) = torch.autograd.grad(fitted, mixer.w, create_graph=True)
        heads.append(convolution(q_[b : b + 1], step(mixer.w, gradient, (1, 2)))[0])
        samples.append(torch.cat(heads, dim=-1))
    assert samples[0].shape == (N, C + d)
    return mixer.out_proj(torch.stack(samples))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("heads", [1, 2])
def test_it_is_the_papers_function_gradients_included(heads: int, grid: tuple[int, int]) -> None:
    assert_same_function(randomised(TTT(6, heads)), literal, grid, 6)


def test_costs() -> None:
    C, N, d = 384, 192, 64
    assert parameters(TTT(C, 6)) == 4 * C**2 + 6 * C * d + 4 * C + 12 * d == 739_584
    assert TTT(C, 6).flops((16, 12)) == 2 * N * (4 * C**2 + 10 * C * d + 18 * d)


def test_the_fitted_weights_start_small() -> None:
    mixer = TTT(64, 2)
    for weight in (mixer.w1, mixer.w2, mixer.w):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_it_can_be_differentiated_where_no_gradient_is_recorded() -> None:
    """The step is written out: autograd inside forward would fail in generation."""
    mixer, x = TTT(6, 2), torch.randn(2, 12, 6)
    expected = mixer(x, (3, 4)).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(mixer(x, (3, 4)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """On 4096 tokens 1/N times a value vanishes in fp16; lengths and weights of the image are in fp32."""
    mixer, x = TTT(32, 2), torch.randn(1, 4096, 32)
    exact = mixer(x, (64, 64))
    with torch.autocast("cpu", dtype):
        mixed = mixer(x, (64, 64))
    narrow = mixer.to(dtype)(x.to(dtype), (64, 64))
    for found in (mixed, narrow):
        assert found.dtype == dtype and ((found - exact).norm() / exact.norm()).item() < 0.02


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(InputError, match="not a multiple of the 4 attention heads"):
        TTT(6, 4)
