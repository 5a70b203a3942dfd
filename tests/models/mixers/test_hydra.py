"""Hydra attention against its formula (arXiv 2209.07484)."""

import pytest
import torch
from mixer_truths import GRIDS, assert_same_function, parameters, randomised
from torch import Tensor

from sit_atconv.models.mixers import Hydra


def literal(mixer: Hydra, x: Tensor, grid: tuple[int, int]) -> Tensor:
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    q, k = (part / part.square().sum(-1, keepdim=True).sqrt() for part in (q, k))
    total = sum(k[:, j] * v[:, j] for j in range(x.shape[1]))
    return mixer.out_proj(torch.stack([q[:, i] * total for i in range(x.shape[1])], dim=1))


@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_the_papers_function_gradients_included(grid: tuple[int, int]) -> None:
    assert_same_function(randomised(Hydra(6)), literal, grid, 6)


def test_costs() -> None:
    assert parameters(Hydra(384)) == 4 * 384**2 + 4 * 384 == 591_360
    assert Hydra(384).flops((16, 12)) == 2 * 4 * 192 * 384**2


def test_a_query_of_zeros_gives_the_bias() -> None:
    mixer = Hydra(6)
    torch.nn.init.zeros_(mixer.qkv.weight)
    x = torch.randn(2, 4, 6, requires_grad=True)
    with torch.no_grad():
        mixer.qkv.bias[:6] = 0
    y = mixer(x, (2, 2))
    torch.testing.assert_close(y, mixer.out_proj.bias.expand(2, 4, 6))
    assert torch.autograd.grad(y.sum(), [x])[0].isfinite().all()


def test_sums_do_not_overflow_in_fp16() -> None:
    """Of 4096 equal tokens: Σ_j k_j v_j is 86,890, more than fp16 can hold; y is 30,720."""
    mixer = Hydra(8)
    with torch.no_grad():
        mixer.qkv.weight.zero_()
        mixer.qkv.bias.fill_(1.0)[16:] = 60
        mixer.out_proj.weight.copy_(torch.eye(8))
        mixer.out_proj.bias.zero_()
        y = mixer.half()(torch.randn(1, 4096, 8).half(), (64, 64))
    torch.testing.assert_close(y, torch.full_like(y, 4096 * 60 / 8), rtol=1e-3, atol=0)
