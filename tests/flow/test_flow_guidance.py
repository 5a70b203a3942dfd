"""Guidance: what is computed, with how many network calls, and when."""

import math

import pytest
import torch
from flow_fields import Recorder
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.flow import guided_velocity, integrate_ode, integrate_sde
from sit_atconv.flow.field import at_step

HALF = torch.tensor(0.5)


class LabelNetwork:
    """A "network" whose output names its label, v = factor·y everywhere, and which counts its batches."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.batches = factor, []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.batches.append(len(x))
        assert t.ndim == 0 or len(t) == len(x) == len(y)
        return self.factor * y.to(x.dtype).view(-1, *[1] * (x.ndim - 1)).expand_as(x)


def test_guidance_extrapolates_from_the_null_class_in_one_batch() -> None:
    network = LabelNetwork()
    velocity = guided_velocity(network, torch.tensor([1, 2]), 3.0, null_label=10)
    expected = [10 + 3 * (1 - 10), 10 + 3 * (2 - 10)]
    assert velocity(torch.zeros(2, 4, 1, 1), HALF)[:, 0].flatten().tolist() == expected
    at_own_times = at_step(velocity, 0.5)(torch.zeros(2, 4, 1, 1), torch.tensor([0.5, 0.4]))
    assert at_own_times[:, 0].flatten().tolist() == expected
    assert network.batches == [4, 4]


def test_autoguidance_extrapolates_from_a_weaker_model() -> None:
    network, weak = LabelNetwork(), LabelNetwork(0.5)
    velocity = guided_velocity(network, torch.tensor([1, 2]), 3.0, null_label=None, weak=weak)
    assert velocity(torch.zeros(2, 1), HALF).flatten().tolist() == [0.5 + 3 * 0.5, 1 + 3 * 1]
    assert (network.batches, weak.batches) == ([2], [2])
    unlabelled = guided_velocity(lambda x, t: x, None, 2.0, null_label=None, weak=lambda x, t: x / 2)
    assert unlabelled(torch.ones(1, 1), HALF).item() == 1.5


def test_autoguidance_of_exact_gaussians_is_the_gaussian_of_the_combined_velocity() -> None:
    """Of two models that shrink towards 0 at rates 1 and 2, scale 3 gives rate 2 + 3·(1 − 2) = −1, exactly."""
    velocity = guided_velocity(lambda x, t: x, None, 3.0, null_label=None, weak=lambda x, t: 2 * x)
    x = integrate_ode(velocity, torch.ones(1, 1).double(), method="dopri5", atol=1e-10, rtol=1e-10)
    assert x.item() == pytest.approx(math.e, rel=1e-9)


@pytest.mark.parametrize("weak", [None, LabelNetwork(5.0)])
def test_guidance_of_some_channels_leaves_the_others_alone(weak: LabelNetwork | None) -> None:
    velocity = guided_velocity(LabelNetwork(), torch.tensor([1]), 2.0, null_label=5, channels=3, weak=weak)
    assert velocity(torch.zeros(1, 4, 1, 1), HALF).flatten().tolist() == [-3, -3, -3, 1]


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint"])
@pytest.mark.parametrize("auto", [False, True])
def test_the_interval_is_decided_at_the_start_of_a_step_and_saves_the_rest(method: str, auto: bool) -> None:
    network, weak = LabelNetwork(), LabelNetwork(0.5)
    velocity = guided_velocity(
        network, torch.tensor([1]), 2.0, null_label=5, interval=(0.0, 0.7), weak=weak if auto else None
    )
    integrate_ode(velocity, torch.zeros(1, 1), 10, method)
    stages = {"euler": 1, "heun": 2, "midpoint": 2}[method]
    alone = 3 * stages  # steps that start at 1.0, 0.9 and 0.8 are not guided, the one at 0.7 is
    guided = 7 * stages - (method == "heun")
    assert network.batches == [1] * alone + [1 if auto else 2] * guided
    assert weak.batches == ([1] * guided if auto else [])


def test_the_second_stage_of_the_sde_follows_the_decision_of_its_step() -> None:
    network = LabelNetwork()
    velocity = guided_velocity(network, torch.tensor([1]), 2.0, null_label=5, interval=(0.0, 0.6))
    times = Recorder(velocity)
    times.at_step = lambda t: Recorder(at_step(velocity, t), times.times, times.batches)
    integrate_sde(times, torch.zeros(1, 1), 4, "heun", last_step="none")
    assert [round(t.item(), 2) for t in times.times] == [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert network.batches == [1, 1, 1, 1, 2, 2, 2]


def test_guidance_one_runs_neither_half_nor_weak_model() -> None:
    network, weak = LabelNetwork(), LabelNetwork()
    velocity = guided_velocity(network, torch.tensor([1, 2]), 1.0, null_label=10, weak=weak)
    assert velocity(torch.zeros(2, 1), HALF).flatten().tolist() == [1, 2]
    assert (network.batches, weak.batches) == ([2], [])


def test_half_precision_networks_are_combined_in_the_states_precision() -> None:
    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(x, 1 / 3, dtype=torch.bfloat16) * (1 + y.bfloat16() / 128).view(-1, 1)

    velocity = guided_velocity(network, torch.tensor([1]), 7.3, null_label=2)
    conditional, null = (network(torch.zeros(1, 1), HALF, torch.tensor([y])).double() for y in (1, 2))
    expected = null + 7.3 * (conditional - null)
    torch.testing.assert_close(velocity(torch.zeros(1, 1), HALF).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": None, "null_label": 3}, "unconditional"),
        ({"null_label": None}, "null class, or a weak model"),
        ({"interval": (0.7, 0.1)}, "0 <= low <= high"),
        ({"interval": (0.0, 1.1)}, "0 <= low <= high"),
        ({"scale": math.nan}, "finite number >= 0, not nan"),
        ({"scale": -1.0}, "finite number >= 0"),
        ({"scale": math.inf}, "finite number >= 0"),
        ({"channels": 0}, "Guidance of 0 channels"),
        ({"channels": 5}, "there are 4"),
        ({"weak": lambda x, t, y: x[:, :1]}, "weak model predicts"),
    ],
)
def test_impossible_combinations_are_refused(options: dict, message: str) -> None:
    arguments = {"labels": torch.tensor([1]), "scale": 2.0, "null_label": 3, **options}
    with pytest.raises(InputError, match=message):
        guided_velocity(LabelNetwork(), **arguments)(torch.zeros(1, 4, 1, 1), HALF)
