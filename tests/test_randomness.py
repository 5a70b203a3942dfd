"""Keyed randomness and the uint8 edge: the two places where reproducibility starts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sit_atconv.errors import InputError
from sit_atconv.images import to_float, to_uint8
from sit_atconv.randomness import Stream, keyed_generator, keyed_normal, keyed_uniform


def test_a_sample_depends_on_its_key_alone() -> None:
    together = keyed_normal(3, Stream.NOISE, range(10), (2, 4))
    apart = torch.cat([keyed_normal(3, Stream.NOISE, [i], (2, 4)) for i in range(10)])
    assert torch.equal(together, apart)
    assert torch.equal(keyed_normal(3, Stream.NOISE, [7, 2], (2, 4)), together[[7, 2]])


@given(seed=st.integers(0, 2**40), index=st.integers(0, 2**40))
def test_keys_that_differ_anywhere_give_other_numbers(seed: int, index: int) -> None:
    draw = keyed_generator(seed, Stream.NOISE, index).random()
    for other in ((seed + 1, Stream.NOISE, index), (seed, Stream.TIME, index), (seed, Stream.NOISE, index + 1)):
        assert keyed_generator(*other).random() != draw
    assert keyed_generator(seed, Stream.NOISE, index).random() == draw


def test_noise_is_standard_normal_and_uncorrelated_between_keys() -> None:
    rows = keyed_normal(0, Stream.NOISE, range(200), (1000,)).double()
    n = rows.numel()
    assert rows.mean().abs() < 5 / math.sqrt(n)
    assert (rows.var() - 1).abs() < 5 * math.sqrt(2 / n)
    correlation = torch.corrcoef(rows) - torch.eye(200)
    assert correlation.abs().max() < 6 / math.sqrt(1000)


def test_uniform_numbers_are_uniform() -> None:
    u = keyed_uniform(0, Stream.TIME, range(4000))
    assert 0 <= u.min() <= u.max() < 1
    steps = (u.sort().values - torch.linspace(0, 1, 4000)).abs().max()  # Kolmogorov-Smirnov
    assert steps < 2 / math.sqrt(4000)


def test_every_grey_level_survives_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels)[[0, 255]].tolist() == [-1.0, 1.0]


@given(st.floats(-2, 2))
def test_quantisation_is_adms(x: float) -> None:
    value = torch.tensor([x], dtype=torch.float32)
    expected = math.floor(min(max((value * 127.5 + 128).item(), 0), 255))
    assert to_uint8(value).item() == expected


def test_truncation_is_half_a_level_darker() -> None:
    x = torch.linspace(-1, 1, 10_001)
    darker = to_uint8(x).float().mean() - to_uint8(x, rounding="truncate").float().mean()
    assert darker.item() == pytest.approx(0.5, abs=0.02)
    with pytest.raises(InputError, match="Unknown rounding 'floor'"):
        to_uint8(x, rounding="floor")
