"""ATConv against a literal transcription of Eq. 7-11 of arXiv 2510.20092, and attention against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import ReleasedATConv
from sit_atconv.errors import InputError
from sit_atconv.models.mixers import ATConv, Attention

GRIDS = [(1, 1), (2, 3), (4, 4), (5, 7), (9, 6), (16, 16), (12, 18)]


def adaptive_average(feature: Tensor, bins: int) -> Tensor:
    """One axis of adaptive average pooling, the last one: bin i averages floor(iL/bins) … ceil((i+1)L/bins)."""
    length = feature.shape[-1]
    edges = [(i * length // bins, math.ceil((i + 1) * length / bins)) for i in range(bins)]
    return torch.stack([feature[..., a:b].mean(-1) for a, b in edges], dim=-1)


def literal_atconv(mixer: ATConv, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Eq. 7-11 as they stand, loops included: project, pool, generate, inhibit, convolve, project."""
    (H, W), K, p = grid, mixer.kernel_size, mixer.kernel_size // 2
    B, _, C = tokens.shape
    X = tokens.transpose(1, 2).reshape(B, C, H, W)

    def pointwise(x: Tensor, linear: torch.nn.Linear) -> Tensor:
        return torch.einsum("oi,bihw->bohw", linear.weight, x) + linear.bias.view(1, -1, 1, 1)

    F_map = pointwise(X, mixer.kernel_proj)  # Eq. 7
    if mixer.pool == "grid":
        Z = adaptive_average(adaptive_average(F_map, K).transpose(2, 3), K).transpose(2, 3)
    else:
        Z = adaptive_average(F_map.flatten(2), K * K).view(B, C, K, K)
    phi = {"gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}[mixer.activation]
    kernels = (phi(Z).flatten(2) @ mixer.kernel_gen.weight.T + mixer.kernel_gen.bias).view(B, C, K, K)  # Eq. 8
    mean = kernels.mean((2, 3), keepdim=True)
    alpha = kernels - torch.sigmoid(mixer.inhibition).view(1, C, 1, 1) * mean  # Eq. 9
    V = pointwise(X, mixer.value_proj)  # Eq. 10
    Y = torch.zeros_like(V)
    for h in range(H):  # Eq. 11
        for w in range(W):
            for u in range(K):
                for v in range(K):
                    row, column = h + u - p, w + v - p
                    if 0 <= row < H and 0 <= column < W:
                        Y[:, :, h, w] = Y[:, :, h, w] + alpha[:, :, u, v] * V[:, :, row, column]
    return pointwise(Y, mixer.out_proj).flatten(2).transpose(1, 2)


def random_atconv(dim: int, dtype: torch.dtype, **options: object) -> ATConv:
    mixer = ATConv(dim, **options).to(dtype)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_atconv_is_the_papers_function_gradients_included(grid, kernel_size, dtype, tolerance) -> None:
    if grid[0] * grid[1] * kernel_size > 1000 and dtype == torch.float32:
        pytest.skip("the large grids are compared in fp64")
    mixer = random_atconv(6, dtype, kernel_size=kernel_size)
    tokens = torch.randn(2, grid[0] * grid[1], 6, dtype=dtype, requires_grad=True)
    wanted = [tokens, *mixer.parameters()]
    ours, literal = mixer(tokens, grid), literal_atconv(mixer, tokens, grid)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weights).sum(), wanted) for y in (ours, literal)]
    for a, b in zip((ours, *gradients[0]), (literal, *gradients[1]), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("pool", ["grid", "raster"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("grid", [(1, 2), (4, 6), (5, 5)])
def test_pools_and_activations(pool: str, activation: str, grid: tuple[int, int]) -> None:
    mixer = random_atconv(4, torch.float64, pool=pool, activation=activation)
    tokens = torch.randn(2, grid[0] * grid[1], 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(tokens, grid), literal_atconv(mixer, tokens, grid))


def test_inhibition_starts_at_one_half() -> None:
    mixer = ATConv(4)
    tokens = torch.randn(1, 16, 4)
    with torch.no_grad():
        kernels = mixer.kernels(tokens, (4, 4))
        mixer.inhibition.fill_(-100.0)  # λ = 0
        plain = mixer.kernels(tokens, (4, 4))
    torch.testing.assert_close(kernels, plain - 0.5 * plain.mean((2, 3), keepdim=True))


def test_each_image_has_its_own_kernels() -> None:
    mixer = random_atconv(4, torch.float64)
    tokens = torch.randn(3, 20, 4, dtype=torch.float64)
    together = mixer(tokens, (4, 5))
    alone = torch.cat([mixer(tokens[i : i + 1], (4, 5)) for i in range(3)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("grid", [(3, 3), (5, 7)])
def test_the_benchmarks_released_atconv_computes_the_same(grid: tuple[int, int]) -> None:
    mixer, released = random_atconv(6, torch.float64), ReleasedATConv(6).double()
    released.load_state_dict(mixer.state_dict())
    tokens = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64)
    torch.testing.assert_close(released(tokens, grid), mixer(tokens, grid), rtol=1e-10, atol=1e-10)


def test_contract_of_parameters() -> None:
    mixer = ATConv(8, kernel_size=3)
    assert mixer.inhibition.shape == (8,)
    assert isinstance(mixer.kernel_gen, torch.nn.Linear) and mixer.kernel_gen(torch.randn(2, 8, 9)).shape == (2, 8, 9)
    assert sum(p.numel() for p in mixer.parameters()) == 3 * 8**2 + 4 * 8 + 3**4 + 3**2
    assert sum(p.numel() for p in Attention(8, 2).parameters()) == 4 * 8**2 + 4 * 8


def test_a_generator_that_does_more_is_called() -> None:
    """As LoRA, hooks, and accelerate's offloading change layers."""
    mixer, tokens = random_atconv(6, torch.float64), torch.randn(2, 12, 6, dtype=torch.float64)
    expected = mixer.kernels(tokens, (3, 4))
    called = []
    mixer.kernel_gen.register_forward_hook(lambda *call: called.append(call))
    torch.testing.assert_close(mixer.kernels(tokens, (3, 4)), expected, rtol=1e-12, atol=1e-12)
    assert len(called) == 1


def test_attention_against_its_definition() -> None:
    mixer = Attention(8, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = torch.softmax(q[..., h] @ k[..., h].transpose(1, 2) / 2.0, dim=-1)
        heads.append(weights @ v[..., h])
    torch.testing.assert_close(mixer(x, (1, 5)), mixer.out_proj(torch.cat(heads, dim=-1)))


def test_a_pool_that_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match="pool"):
        ATConv(4, pool="grids")
