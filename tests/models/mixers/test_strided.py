"""Strided attention against its definition, token by token."""

import math

import pytest
import torch
from mixer_truths import GRIDS, assert_same_function, convolution, linear, parameters, randomised
from torch import Tensor

from sit_atconv import create_model
from sit_atconv.errors import InputError
from sit_atconv.models.mixers import Strided, create_mixer, mixer_flops

OPTIONS = [{}, {"logits": "dot"}, {"stride": 3, "kernel_size": 3}, {"stride": 1, "logits": "dot"}]


def turned(x: Tensor, row: int, column: int) -> Tensor:
    """Rotary embedding of one vector (B, d), channel by channel."""
    d, y = x.shape[-1], []
    for m in range(d // 4):
        f = 10_000 ** (-4 * m / d)
        for first, angle in ((4 * m, column * f), (4 * m + 2, row * f)):
            a, b = x[:, first], x[:, first + 1]
            y += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.stack(y, dim=-1)


def literal_strided(mixer: Strided, x: Tensor, grid: tuple[int, int]) -> Tensor:
    (H, W), r, h = grid, mixer.stride, mixer.num_heads
    d = mixer.dim // h
    q, k, v = linear(x + convolution(x, mixer.conv.weight, mixer.conv.bias, grid), mixer.qkv).chunk(3, dim=-1)
    places = [(i, j) for i in range(H) for j in range(W)]
    heads = []
    for head in range(h):
        part, rows = slice(head * d, (head + 1) * d), []
        queries, keys = (
            [turned(each[:, n, part], i // r, j // r) for n, (i, j) in enumerate(places)] for each in (q, k)
        )
        for here, (i, j) in enumerate(places):
            seen = [n for n, (a, b) in enumerate(places) if (a % r, b % r) == (i % r, j % r)]
            scores = []
            for there in seen:
                a, b = queries[here], keys[there]
                if mixer.logit_scale is None:
                    scores.append((a * b).sum(-1) / math.sqrt(d))
                else:
                    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
                    scores.append(cosine * mixer.logit_scale[head].clamp(max=math.log(100)).exp())
            rows.append((torch.stack(scores, dim=-1).softmax(-1)[..., None] * v[:, seen, part]).sum(1))
        heads.append(torch.stack(rows, dim=1))
    return linear(torch.cat(heads, dim=-1), mixer.out_proj)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_token_attends_to_its_phase(grid: tuple[int, int], options: dict[str, object]) -> None:
    assert_same_function(randomised(Strided(16, 2, **options)), literal_strided, grid, dim=16)


def test_the_cosines_scale_is_bounded() -> None:
    mixer, x = Strided(8, 1).double(), torch.randn(1, 16, 8, dtype=torch.float64)
    outputs = []
    for scale in (math.log(100), 50.0):
        torch.nn.init.constant_(mixer.logit_scale, scale)
        outputs.append(mixer(x, (4, 4)))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    assert torch.allclose(Strided(8, 2).logit_scale, torch.tensor(10.0).log())


def test_zero_queries_are_no_trap() -> None:
    """A query of length 0 has no direction: its cosines are 0."""
    mixer = Strided(8, 2)
    torch.nn.init.zeros_(mixer.qkv.weight), torch.nn.init.zeros_(mixer.qkv.bias)
    x = torch.randn(1, 16, 8, requires_grad=True)
    y = mixer(x, (4, 4))
    gradient = torch.autograd.grad(y.sum(), [x, mixer.qkv.weight])
    assert all(each.isfinite().all() for each in (y, *gradient))


def test_parameters_and_operations() -> None:
    C, h = 384, 6
    with torch.device("meta"):
        cosine, dot = create_mixer("strided", C, h), create_mixer("strided", C, h, logits="dot")
    assert (parameters(cosine), parameters(dot)) == (4 * C**2 + 30 * C + h, 4 * C**2 + 30 * C)
    for (H, W), padded in (((16, 16), 256), ((5, 4), 24), ((1, 1), 4)):
        products = 4 * H * W * C**2 + 25 * H * W * C + 2 * padded**2 * C // 4
        assert mixer_flops(cosine, (H, W)) == mixer_flops(dot, (H, W)) == 2 * products


@pytest.mark.parametrize(("name", "millions"), [("SiT-S/2", 32.98), ("SiT-XL/2", 675.66)])
def test_size_of_whole_models(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model(name, mixer_pattern="strided")
    assert round(model.num_parameters() / 1e6, 2) == millions


def test_options_out_of_range_are_refused() -> None:
    for options, message in (
        ({"stride": 0}, "stride must be positive"),
        ({"kernel_size": 4}, "must be odd"),
        ({"logits": "cosin"}, "did you mean 'cosine'"),
        ({"num_heads": 3}, "not a multiple of the 3 attention heads"),
        ({"num_heads": 4}, "heads of a multiple of 4 channels, not 2"),
    ):
        with pytest.raises(InputError, match=message):
            create_mixer("strided", 8, **{"num_heads": 2, **options})
