"""Measures of maps and operators, by what they are for operators and maps that are known."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sit_atconv.analysis import centre_surround_contrast, channel_effective_rank, far, influence, suppression
from sit_atconv.analysis.measures import Operator, arrow
from sit_atconv.errors import InputError
from sit_atconv.models.mixers import create_mixer

C, SIDE, ANCHOR = 32, 14, (6, 8)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operator(name: str, **options: object) -> Operator:
    torch.manual_seed(0)
    mixer = create_mixer(name, C, 4, **options)
    return lambda x: mixer(x.flatten(2).mT, tuple(x.shape[-2:])).mT.unflatten(2, x.shape[-2:])


def static(kernel: int) -> Operator:
    weight = draw(C, 1, kernel, kernel)
    return lambda x: F.conv2d(x, weight, padding=kernel // 2, groups=C)


def test_influence_is_the_sum_of_absolute_derivatives() -> None:
    weight = draw(3, 2, 3, 3)
    found = influence(lambda x: F.conv2d(x, weight, padding=1), draw(1, 2, 7, 5), (3, 2), 1)
    expected = torch.zeros(7, 5)
    expected[2:5, 1:4] = weight[1].abs().sum(0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("kernel", "radius"), [(3, 1.5), (7, 4.3)])
def test_static_convolutions_route_nothing_beyond_their_reach_and_suppress_nothing(kernel: int, radius: float) -> None:
    x = draw(1, C, SIDE, SIDE)
    influences = influence(static(kernel), x, ANCHOR, 5)
    assert far(influences, ANCHOR, radius) == 0
    assert far(influences, ANCHOR, 0.5) > 0.5
    assert suppression(static(kernel), x, ANCHOR, 5).eq(0).all()


@pytest.mark.parametrize(
    ("name", "options", "low", "high"),
    [("attention", {}, 0.6, 0.8), ("atconv", {"pool": "raster"}, 0.3, 0.55), ("atconv", {}, 0.15, 0.4)],
)
def test_dynamic_operators_route_far(name: str, options: dict, low: float, high: float) -> None:
    shares = [
        far(influence(operator(name, **options), draw(1, C, SIDE, SIDE), ANCHOR, c), ANCHOR, 4.3) for c in range(8)
    ]
    assert low < sum(shares) / 8 < high


@pytest.mark.parametrize("name", ["attention", "atconv"])
def test_dynamic_operators_suppress(name: str) -> None:
    x = draw(1, C, SIDE, SIDE)
    lost = suppression(operator(name), x, ANCHOR, 3)
    assert lost[ANCHOR] == 0 and 0 < lost.sum() < 1
    assert suppression(operator(name), x, ANCHOR, 3, epsilon=0).eq(0).all()


def test_arrows_point_to_the_influence() -> None:
    influences = torch.zeros(SIDE, SIDE)
    influences[ANCHOR] = 9
    assert arrow(influences, ANCHOR) == ANCHOR
    influences[1, 2], influences[1, 4] = 1, 1
    row, column = arrow(influences, ANCHOR)
    assert row == pytest.approx(1) and 2 < column < 3  # the further one counts more
    assert far(influences, ANCHOR, 4) == pytest.approx(2 / 11)


def test_contrast_of_known_maps() -> None:
    noise = draw(8, 4, 64, 64).double()
    assert centre_surround_contrast(noise) == pytest.approx(0.87, abs=0.01)
    assert centre_surround_contrast(-7 * noise) == pytest.approx(centre_surround_contrast(noise), rel=1e-12)
    assert centre_surround_contrast(torch.full((1, 2, 5, 3), 3.0)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="3×3 positions or more, not 2×9"):
        centre_surround_contrast(draw(1, 1, 2, 9))


def test_contrast_is_its_definition() -> None:
    x = draw(1, 1, 6, 7).double()
    weights = torch.exp(-torch.tensor([4.0, 1, 0, 1, 4]).double() / 2)
    kernel = torch.outer(weights, weights)
    kernel /= kernel.sum()
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")[0, 0]
    blurred = torch.stack(
        [torch.stack([(padded[i : i + 5, j : j + 5] * kernel).sum() for j in range(7)]) for i in range(6)]
    )
    expected = (x[0, 0] - blurred).abs().mean() / x.abs().mean()
    assert centre_surround_contrast(x) == pytest.approx(expected.item(), rel=1e-12)


def test_rank_of_known_maps() -> None:
    noise = draw(8, C, SIDE, SIDE)
    assert channel_effective_rank(noise) == pytest.approx(0.99, abs=0.01)
    assert channel_effective_rank(3 * noise + 5) == pytest.approx(channel_effective_rank(noise), rel=1e-5)
    one = draw(8, 1, SIDE, SIDE) * draw(C, 1, 1, seed=1)
    assert channel_effective_rank(one) == pytest.approx(1 / C, rel=1e-3)
    two = torch.cat([noise[:, :1].expand(-1, C // 2, -1, -1), noise[:, 1:2].expand(-1, C // 2, -1, -1)], 1)
    assert channel_effective_rank(two) == pytest.approx(2 / C, rel=2e-3)
