"""Linear attention with a ReLU kernel against its formula (SANA, arXiv 2410.10629; LiT, arXiv 2501.12976)."""

import pytest
import torch
from mixer_truths import GRIDS, assert_same_function, convolution, parameters, randomised
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.models.mixers import LinearAttention
from sit_atconv.models.mixers.linear_attention.linear import relu_attention

OPTIONS = [{}, {"kernel_size": 0}, {"kernel_size": 3, "qk_norm": True, "qkv_bias": False}]


def literal(mixer: LinearAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    if mixer.q_norm is not None:
        q, k = (
            part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
            for part, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
        )
    q, k = q.clamp(min=0), k.clamp(min=0)
    d, tokens = mixer.dim // mixer.num_heads, range(x.shape[1])
    heads = []
    for h in range(mixer.num_heads):
        q_h, k_h, v_h = (part[..., h * d : (h + 1) * d] for part in (q, k, v))
        S = sum(k_h[:, j, :, None] * v_h[:, j, None, :] for j in tokens)
        z = sum(k_h[:, j] for j in tokens)
        rows = [torch.einsum("bd,bde->be", q_h[:, i], S) / ((q_h[:, i] * z).sum(-1, True) + 1e-15) for i in tokens]
        heads.append(torch.stack(rows, dim=1))
    y = torch.cat(heads, dim=-1)
    if mixer.depthwise is not None:
        y = y + convolution(v, mixer.depthwise.weight, mixer.depthwise.bias, grid)
    return mixer.out_proj(y)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_papers_function_gradients_included(options: dict, grid: tuple[int, int]) -> None:
    assert_same_function(randomised(LinearAttention(8, 2, **options)), literal, grid, 8)


def test_costs() -> None:
    C, N, d = 384, 192, 64
    for k in (0, 5):
        mixer = LinearAttention(C, 6, kernel_size=k)
        assert parameters(mixer) == 4 * C**2 + 4 * C + (k > 0) * (k**2 + 1) * C
        assert mixer.flops((16, 12)) == 2 * (4 * N * C**2 + 2 * N * C * d + N * C + k**2 * N * C)
    assert parameters(LinearAttention(C, 6)) == 601_344
    assert parameters(LinearAttention(C, 6, kernel_size=0, qk_norm=True, qkv_bias=False)) == 4 * C**2 + C + 2 * C


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_are_made_in_fp32(dtype: torch.dtype, autocast: bool) -> None:
    """Of 4096 tokens with keys times 30, in fp16 the sums would overflow, in bf16 be wrong by 0.4 %."""
    q, k, v = torch.randn(3, 1, 2, 4096, 16).to(dtype)
    k = 30 * k
    exact = relu_attention(q.double(), k.double(), v.double())
    lower = torch.bfloat16 if dtype == torch.float32 else dtype
    with torch.autocast("cpu", lower, enabled=autocast):
        found = relu_attention(q, k, v)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 3e-3, torch.float32: 1e-6}[dtype]
    assert found.dtype == dtype and (found - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_query_without_a_positive_channel_gives_zero(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 2, 9, 4).to(dtype)
    q[:, :, 3], k[1] = -1, -1  # one query in every image, and all keys of the second
    for part in (q, k, v):
        part.requires_grad_()
    y = relu_attention(q, k, v)
    assert not y[:, :, 3].any() and not y[1].any() and y[0].isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.float().sum(), (q, k, v)))


def test_the_output_is_bounded_and_its_gradient_is_not() -> None:
    """y is an average of values; the shorter a query is, the faster it turns."""
    k, v = torch.randn(2, 1, 1, 64, 8, dtype=torch.float64)
    lengths = []
    for scale in (1.0, 1e-3, 1e-6):
        q = (scale * torch.rand(1, 1, 1, 8, dtype=torch.float64)).requires_grad_()
        y = relu_attention(q, k, v)
        assert (y.abs() <= v.abs().amax(-2, keepdim=True)).all()
        lengths.append(torch.autograd.grad(y[..., 0].sum(), q)[0].norm())
    assert lengths[2] > 1e2 * lengths[1] > 1e4 * lengths[0]


@pytest.mark.parametrize("kernel_size", [4, -1])
def test_kernels_without_a_centre_are_refused(kernel_size: int) -> None:
    with pytest.raises(InputError, match=f"odd, or 0 for no convolution, not {kernel_size}"):
        LinearAttention(8, 2, kernel_size=kernel_size)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(InputError, match="not a multiple of the 3 attention heads"):
        LinearAttention(8, 3)


def test_norms_are_computed_in_the_dtype_of_their_weights(recwarn: pytest.WarningsRecorder) -> None:
    """torch warns, and has no fused norm, where they differ."""
    mixer, x = LinearAttention(8, 2, qk_norm=True), torch.randn(1, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer(x, (2, 2)).dtype == torch.bfloat16
    assert mixer.bfloat16()(x.bfloat16(), (2, 2)).dtype == torch.bfloat16
    assert not [warning for warning in recwarn if "dtype" in str(warning.message)]
