"""InLine attention against its formulas (arXiv 2412.06590)."""

import pytest
import torch
import torch.nn.functional as F
from mixer_truths import GRIDS, assert_same_function, parameters, per_sample_convolution, randomised
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.models.mixers import InLine
from sit_atconv.models.mixers.linear_attention.inline import injective_attention

OPTIONS = [{}, {"lepe": False}, {"qkv_bias": True}]


def literal(mixer: InLine, x: Tensor, grid: tuple[int, int]) -> Tensor:
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    N, d = x.shape[1], mixer.dim // mixer.num_heads
    heads = []
    for h in range(mixer.num_heads):
        q_h, k_h, v_h = (part[..., h * d : (h + 1) * d] for part in (q, k, v))
        S = sum(k_h[:, j, :, None] * v_h[:, j, None, :] for j in range(N)) * d**-0.5 / N
        k_mean, v_mean = k_h.mean(1), v_h.mean(1)
        rows = []
        for i in range(N):
            rest = 1 - d**-0.5 * (q_h[:, i] * k_mean).sum(-1, keepdim=True)
            rows.append(torch.einsum("bd,bde->be", q_h[:, i], S) + rest * v_mean)
        heads.append(torch.stack(rows, dim=1))
    y = torch.cat(heads, dim=-1)

    context = x.mean(1)[:, :, None, None]
    hidden = F.conv2d(context, mixer.kernel_proj.weight[..., None], mixer.kernel_proj.bias, groups=mixer.num_heads)
    weights, bias = mixer.kernel_gen.weight[..., None], mixer.kernel_gen.bias
    kernels = F.conv2d(F.gelu(hidden), weights, bias, groups=mixer.num_heads).reshape(len(x), mixer.dim, 3, 3)
    y = y + per_sample_convolution(v, kernels, grid)
    if mixer.lepe is not None:
        y = y + per_sample_convolution(v, mixer.lepe.expand(len(x), -1, -1, -1), grid) + mixer.lepe_bias
    return mixer.out_proj(y)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_papers_function_gradients_included(options: dict, grid: tuple[int, int]) -> None:
    assert_same_function(randomised(InLine(8, 2, **options)), literal, grid, 8)


def test_costs() -> None:
    C, N, d = 384, 192, 64
    of_the_table = 4 * C**2 + C + 10 * C + 10 * C * d + 10 * C
    assert parameters(InLine(C, 6)) == of_the_table == 843_648
    assert parameters(InLine(C, 6, qkv_bias=True, lepe=False)) == of_the_table + 3 * C - 10 * C
    assert InLine(C, 6).flops((16, 12)) == 2 * (4 * N * C**2 + 2 * N * C * d + 9 * N * C + 10 * C * d)


def test_the_parameters_of_table_nine_of_the_atconv_paper() -> None:
    """AttNet-T2 without mixers has 20,456,724 parameters; with InLine, 31.63 M."""
    stages = zip((3, 3, 16, 3), (64, 128, 288, 512), (2, 4, 8, 16), strict=True)
    with torch.device("meta"):
        mixers = sum(depth * parameters(InLine(width, heads)) for depth, width, heads in stages)
    assert 20_456_724 + mixers == 31_632_468


def test_weights_sum_to_one() -> None:
    q, k = torch.randn(2, 2, 2, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(injective_attention(q, k, torch.ones_like(k)), torch.ones_like(k))


def test_sums_are_made_in_fp32() -> None:
    q, k, v = torch.randn(3, 1, 2, 4096, 16).half()
    k = 300 * k + 100  # in fp16 the sums would overflow
    exact = injective_attention(q.double(), k.double(), v.double())
    with torch.autocast("cpu", torch.float16):
        found = injective_attention(q, k, v)
    assert found.dtype == torch.float16 and (found - exact).norm() / exact.norm() < 1e-3


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(InputError, match="not a multiple of the 3 attention heads"):
        InLine(8, 3)
