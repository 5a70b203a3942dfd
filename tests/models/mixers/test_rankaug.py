"""Rank-augmented linear attention against its formulas (RALA, arXiv 2411.07635)."""

import math

import pytest
import torch
import torch.nn.functional as F
from mixer_truths import GRIDS, assert_same_function, convolution, parameters, randomised
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.models.mixers import RankAugmented
from sit_atconv.models.mixers.linear_attention.rankaug import rank_augmented_attention


def turned(x: Tensor, row: int, column: int) -> Tensor:
    """The rotary embedding of one token's head x (B, d): the first half by row, the second by column."""
    quarter = x.shape[-1] // 4
    exponents = torch.linspace(0, 1, quarter, dtype=torch.float64).tolist()
    channels = []
    for pair in range(2 * quarter):
        angle = (row if pair < quarter else column) * 10000 ** -exponents[pair % quarter]
        a, b = x[:, 2 * pair], x[:, 2 * pair + 1]
        channels += [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
    return torch.stack(channels, dim=-1)


def literal_head(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    N, d = q.shape[1:]
    q, k = F.elu(q) + 1, F.elu(k) + 1
    scores = torch.stack([d**-0.5 * (q.mean(1) * k[:, j]).sum(-1) for j in range(N)], dim=-1)
    k = k * (torch.softmax(scores, dim=-1) * N).unsqueeze(-1)
    places = [(h, w) for h in range(grid[0]) for w in range(grid[1])]
    S = sum(turned(k[:, j], *places[j])[:, :, None] * v[:, j, None, :] for j in range(N)) / N
    rows = []
    for i in range(N):
        z = 1 / ((q[:, i] * k.mean(1)).sum(-1, keepdim=True) + 1e-6)
        rows.append(z * torch.einsum("bd,bde->be", turned(q[:, i], *places[i]), S))
    return torch.stack(rows, dim=1)


def literal(mixer: RankAugmented, x: Tensor, grid: tuple[int, int]) -> Tensor:
    q, k, v, o = mixer.qkvo(x).chunk(4, dim=-1)
    heads = zip(*(part.chunk(mixer.num_heads, dim=-1) for part in (q, k, v)), strict=True)
    y = torch.cat([literal_head(*each, grid) for each in heads], dim=-1)
    y = y + convolution(v, mixer.depthwise.weight, mixer.depthwise.bias, grid)
    return mixer.out_proj(y * o)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("dim", "heads"), [(8, 2), (12, 1)])
def test_it_is_the_papers_function_gradients_included(dim: int, heads: int, grid: tuple[int, int]) -> None:
    assert_same_function(randomised(RankAugmented(dim, heads)), literal, grid, dim)


def test_costs() -> None:
    C, N, d = 384, 192, 64
    assert parameters(RankAugmented(C, 6)) == 5 * C**2 + 31 * C == 749_184
    assert RankAugmented(C, 6).flops((16, 12)) == 2 * (5 * N * C**2 + 2 * N * C * d + 27 * N * C)


def test_the_parameters_of_table_nine_of_the_atconv_paper() -> None:
    """AttNet-T2 without mixers has 20,456,724 parameters; with RALA, 31.54 M."""
    stages = zip((3, 3, 16, 3), (64, 128, 288, 512), (1, 2, 6, 8), strict=True)
    with torch.device("meta"):
        mixers = sum(depth * parameters(RankAugmented(width, heads)) for depth, width, heads in stages)
    assert 20_456_724 + mixers == 31_539_924


def test_sums_are_made_in_fp32() -> None:
    q, k, v = torch.randn(3, 1, 2, 4096, 16).half()
    k = 30 * k
    exact = rank_augmented_attention(q.double(), k.double(), v.double(), (64, 64))
    with torch.autocast("cpu", torch.float16):
        found = rank_augmented_attention(q, k, v, (64, 64))
    assert found.dtype == torch.float16 and (found - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_queries_of_zeros_give_no_nan(dtype: torch.dtype) -> None:
    """elu(q) + 1 is exactly zero for a query far below zero."""
    q, k, v = torch.randn(3, 1, 1, 9, 4).to(dtype)
    q[:, :, 3] = -200
    for part in (q, k, v):
        part.requires_grad_()
    y = rank_augmented_attention(q, k, v, (3, 3))
    assert not y[:, :, 3].any() and y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.float().sum(), (q, k, v)))


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="a multiple of 4"):
        RankAugmented(12, 2)
    with pytest.raises(InputError, match="not a multiple of the 5 attention heads"):
        RankAugmented(12, 5)
