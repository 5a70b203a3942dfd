"""The static convolutions and DiCo's mixer against their formulas, written as loops."""

import math

import pytest
import torch
from mixer_truths import GRIDS, assert_same_function, convolution, linear, parameters, randomised
from torch import Tensor

from sit_atconv import create_model
from sit_atconv.errors import InputError
from sit_atconv.models.mixers import Conv, DiCo, DWConv, create_mixer, mixer_flops


def literal_conv(mixer: Conv, x: Tensor, grid: tuple[int, int]) -> Tensor:
    return convolution(x, mixer.conv.weight, mixer.conv.bias, grid)


def literal_dwconv(mixer: DWConv, x: Tensor, grid: tuple[int, int]) -> Tensor:
    if not mixer.projections:
        return convolution(x, mixer.conv.weight, mixer.conv.bias, grid)
    values = linear(x, mixer.value_proj)
    return linear(convolution(values, mixer.conv.weight, mixer.conv.bias, grid), mixer.out_proj)


def literal_dico(mixer: DiCo, x: Tensor, grid: tuple[int, int]) -> Tensor:
    u = convolution(linear(x, mixer.in_proj), mixer.conv.weight, mixer.conv.bias, grid)
    u = u * (1 + torch.erf(u / math.sqrt(2))) / 2  # exact GELU
    gate = 1 / (1 + torch.exp(-linear(u.mean(1), mixer.gate)))
    return linear(u * gate[:, None], mixer.out_proj)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_conv(grid: tuple[int, int], kernel_size: int) -> None:
    assert_same_function(randomised(Conv(6, kernel_size)), literal_conv, grid, dim=6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("projections", [False, True])
def test_dwconv(grid: tuple[int, int], kernel_size: int, projections: bool) -> None:
    assert_same_function(randomised(DWConv(6, kernel_size, projections)), literal_dwconv, grid, dim=6)


@pytest.mark.parametrize("grid", GRIDS)
def test_dico(grid: tuple[int, int]) -> None:
    assert_same_function(randomised(DiCo(6)), literal_dico, grid, dim=6)


C, N = 384, 9 * 16
COUNTS = [  # mixer, options, parameters, multiply-adds
    ("conv", {}, 9 * C**2 + C, 9 * N * C**2),
    ("conv", {"kernel_size": 5}, 25 * C**2 + C, 25 * N * C**2),
    *[("dwconv", {"kernel_size": k}, (k**2 + 1) * C, k**2 * N * C) for k in (3, 5, 7)],
    ("dwconv", {"projections": True}, 10 * C + 2 * C**2 + 2 * C, 9 * N * C + 2 * N * C**2),
    ("dico", {}, 3 * C**2 + 13 * C, 2 * N * C**2 + 9 * N * C + C**2),
]


@pytest.mark.parametrize(("name", "options", "numbers", "products"), COUNTS)
def test_parameters_and_operations(name: str, options: dict[str, object], numbers: int, products: int) -> None:
    with torch.device("meta"):
        mixer = create_mixer(name, C, **options)
    assert (parameters(mixer), mixer_flops(mixer, (9, 16))) == (numbers, 2 * products)


@pytest.mark.parametrize(
    ("entry", "millions"),
    [
        ({"name": "conv"}, (41.69, 860.51)),
        ({"name": "dwconv", "kernel_size": 7}, (25.99, 527.66)),
        ({"name": "dwconv", "projections": True}, (29.36, 600.76)),
        ({"name": "dico"}, (31.13, 637.95)),
    ],
)
def test_size_of_whole_models(entry: dict[str, object], millions: tuple[float, float]) -> None:
    with torch.device("meta"):
        models = [create_model(f"SiT-{size}/2", mixer_pattern=[entry]) for size in ("S", "XL")]
    assert tuple(round(model.num_parameters() / 1e6, 2) for model in models) == millions


def test_dico_starts_as_released() -> None:
    """Xavier counts C inputs and outputs times nine taps per kernel: std √(2 / (9 + 9C))."""
    mixer = create_model("SiT-S/2", depth=1, mixer_pattern="dico").blocks[0].mixer
    assert abs(mixer.conv.weight.std() / math.sqrt(2 / (9 + 9 * 384)) - 1) < 0.05
    assert not mixer.conv.bias.any() and not mixer.gate.bias.any()


@pytest.mark.parametrize("name", ["conv", "dwconv"])
def test_even_kernels_are_refused(name: str) -> None:
    for kernel_size in (0, 2):
        with pytest.raises(InputError, match=f"must be odd and positive, not {kernel_size}"):
            create_mixer(name, 8, kernel_size=kernel_size)
