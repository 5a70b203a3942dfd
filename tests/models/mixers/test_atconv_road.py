"""ATConv's options that lead from a depthwise convolution to ATConv: Table IX c of arXiv 2510.20092."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from mixer_truths import GRIDS, assert_same_function, convolution, linear, parameters, randomised
from torch import Tensor

from sit_atconv import SiT, create_model
from sit_atconv.errors import InputError
from sit_atconv.models.mixers import ATConv, DWConv, create_mixer, mixer_flops

# AttNet-T2, on which the paper makes its ablation: the parameters of the rest, and width by number of blocks.
REST, WIDTHS = 20_456_724, {64: 3, 128: 3, 288: 16, 512: 3}
BARE = {"value": False, "out": False, "inhibition": "none"}
ROAD = [  # row of the table, options, parameters in all
    ("3×3 DWConv", {**BARE, "kernels": "static"}, 20_523_924),
    ("+ kernel generator", BARE, 22_640_670),
    ("+ last projection", {**BARE, "out": True}, 24_822_366),
    ("+ value projection", {"inhibition": "none"}, 27_004_062),
    ("+ softmax", {"inhibition": "softmax"}, 27_004_062),
    ("kernel difference", {"inhibition": "difference"}, 27_004_062),
    ("differential modulation", {}, 27_010_782),
]


def literal(mixer: ATConv, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Each part as its formula says, sample by sample."""
    K, C = mixer.kernel_size, mixer.dim
    samples = []
    for tokens in x.split(1):
        if mixer.generated:
            features = linear(tokens, mixer.kernel_proj)
            pooled = F.adaptive_avg_pool2d(features.mT.unflatten(2, grid), K).flatten(2)  # (1, C, K²)
            kernels = linear(F.gelu(pooled), mixer.kernel_gen)[0].view(C, K, K)
            bias = torch.zeros(C, dtype=x.dtype)
        else:
            kernels, bias = mixer.conv.weight[:, 0], mixer.conv.bias
        if mixer.inhibited_by == "dkm":
            kernels = kernels - mixer.inhibition.sigmoid().view(C, 1, 1) * kernels.mean((1, 2), keepdim=True)
        elif mixer.inhibited_by == "softmax":
            kernels = kernels.exp() / kernels.exp().sum((1, 2), keepdim=True)
        elif mixer.inhibited_by == "difference":
            centre = torch.zeros(K, K, dtype=x.dtype)
            centre[K // 2, K // 2] = 1
            kernels = kernels - centre * kernels.sum((1, 2), keepdim=True)
        values = linear(tokens, mixer.value_proj) if isinstance(mixer.value_proj, torch.nn.Linear) else tokens
        y = convolution(values, kernels[:, None], bias, grid)
        samples.append(linear(y, mixer.out_proj) if isinstance(mixer.out_proj, torch.nn.Linear) else y)
    return torch.cat(samples)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernels", ["generated", "static"])
@pytest.mark.parametrize("inhibition", ["none", "softmax", "difference", "dkm"])
def test_each_option_is_its_formula(grid: tuple[int, int], kernels: str, inhibition: str) -> None:
    for value, out in itertools.product([False, True], repeat=2):
        mixer = ATConv(6, kernels=kernels, value=value, out=out, inhibition=inhibition)
        assert_same_function(randomised(mixer), literal, grid, dim=6)


@pytest.mark.parametrize(("options", "total"), [row[1:] for row in ROAD], ids=[row[0] for row in ROAD])
def test_rows_of_the_table_have_its_parameters(options: dict[str, object], total: int) -> None:
    with torch.device("meta"):
        counts = {width: parameters(create_mixer("atconv", width, **options)) for width in WIDTHS}
    assert REST + sum(blocks * counts[width] for width, blocks in WIDTHS.items()) == total


def test_operations() -> None:
    C, N, (H, W) = 16, 35, (5, 7)
    generation = 9 * C**2 + C * 81
    for options, products in (
        ({**BARE, "kernels": "static"}, 9 * N * C),
        (BARE, 9 * N * C + generation),
        ({**BARE, "out": True}, 9 * N * C + generation + N * C**2),
        ({"inhibition": "difference"}, 9 * N * C + generation + 2 * N * C**2),
        ({}, 9 * N * C + generation + 2 * N * C**2),
    ):
        assert mixer_flops(ATConv(C, **options), (H, W)) == 2 * products


def test_the_first_row_is_the_depthwise_convolution() -> None:
    """Its weights, too; with both projections it is `dwconv` with projections."""
    for first, second in (({**BARE}, {}), ({"inhibition": "none"}, {"projections": True})):
        mixer, dwconv = ATConv(6, kernels="static", **first), DWConv(6, **second)
        dwconv.load_state_dict(mixer.state_dict())
        x = torch.randn(2, 20, 6)
        torch.testing.assert_close(mixer(x, (4, 5)), dwconv(x, (4, 5)))


def test_a_difference_does_not_see_constants() -> None:
    mixer = randomised(ATConv(6, value=False, out=False, inhibition="difference"))
    x = torch.randn(1, 1, 6, dtype=torch.float64).expand(1, 25, 6)
    inside = mixer(x, (5, 5)).view(5, 5, 6)[1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.zeros_like(inside), rtol=0, atol=1e-12)


def test_defaults_leave_files_as_they_are(tmp_path) -> None:
    """Names of weights and config.json; other options stand in the pattern, and survive saving."""
    tiny = {"input_size": 8, "hidden_size": 32, "num_heads": 2, "depth": 2, "num_classes": 0}
    plain = ["kernel_proj.weight", "kernel_proj.bias", "kernel_gen.weight", "kernel_gen.bias"]
    plain += ["value_proj.weight", "value_proj.bias", "out_proj.weight", "out_proj.bias"]
    assert list(ATConv(8).state_dict()) == ["inhibition", *plain]
    assert create_model("SiT-ATConv-S/2", **tiny, inhibition="dkm", out=True).config.mixer_pattern == "atconv"
    model = create_model("SiT-ATConv-S/2", **tiny, inhibition="softmax", value=False)
    model.save_pretrained(tmp_path)
    again = SiT.from_pretrained(tmp_path)
    assert again.config.mixer_pattern == [{"name": "atconv", "value": False, "inhibition": "softmax"}]
    assert again.blocks[1].mixer.inhibited_by == "softmax"


def test_unknown_options_are_refused() -> None:
    for options, message in (
        ({"kernels": "dynamic"}, "Unknown kind of kernels 'dynamic'"),
        ({"inhibition": "sofmax"}, "did you mean 'softmax'"),
        ({"value": "no"}, "does not accept value = 'no'"),
        ({"kernel_size": 2}, "must be odd"),
    ):
        with pytest.raises(InputError, match=message):
            create_mixer("atconv", 8, **options)
