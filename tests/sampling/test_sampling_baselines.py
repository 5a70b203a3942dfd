"""The transcribed loops of SiT and REPA against ours: the same images from the same weights and noise."""

import pytest
import torch
from sampling_fixtures import tiny_model
from torch import Tensor

from benchmarks.baselines import repa_euler_maruyama, sit_euler_maruyama
from sit_atconv.sampling import SamplerSettings
from sit_atconv.sampling.draw import Drawing

STEPS, SCALE = 12, 1.8


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor]:
    """Noise, labels and increments."""
    return torch.randn(3, 4, 8, 6).double(), torch.tensor([2, 0, 2]), torch.randn(STEPS, 3, 4, 8, 6).double()


def test_sit_calls_twice_what_ours_calls_once(given) -> None:
    noise, labels, increments = given
    model = tiny_model(in_channels=4).double()
    rows = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    theirs = sit_euler_maruyama(model, noise, labels, 3, STEPS, SCALE, increments)
    assert rows == [6] * (2 * STEPS)
    rows.clear()
    settings = SamplerSettings("sde", STEPS, SCALE, guidance_channels=3)
    ours = Drawing(model, settings).integrate(noise, labels, increments.__getitem__)
    assert rows == [6] * STEPS
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # SiT's grid is in fp32


def test_repa_guides_within_its_interval(given) -> None:
    noise, labels, increments = given
    model = tiny_model(in_channels=4).double()
    rows = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    theirs = repa_euler_maruyama(model, noise, labels, 3, STEPS, SCALE, (0.0, 0.7), increments)
    counted = rows.copy()
    rows.clear()
    settings = SamplerSettings("sde", STEPS, SCALE, (0.0, 0.7))
    ours = Drawing(model, settings).integrate(noise, labels, increments.__getitem__)
    assert rows == counted
    assert set(rows) == {3, 6}
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
