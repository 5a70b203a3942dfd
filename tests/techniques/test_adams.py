"""Adams-Bashforth solvers: weights, orders of convergence, calls, and where their history is forgotten."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from flow_fields import INTERPOLANTS, MEAN, STD, GaussianField, Recorder
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_fixtures import images_of, require_same_images, tiny_model
from torch import Tensor

from sit_atconv.flow import Interpolant, Linear, bits_per_dimension, guided_velocity, integrate_ode
from sit_atconv.flow.adams import ADAMS_ORDERS, adams_weights
from sit_atconv.flow.field import at_step
from sit_atconv.flow.likelihood import VelocityAndTrace
from sit_atconv.flow.ode import ode_times
from sit_atconv.flow.predictions import velocity_from_prediction
from sit_atconv.models import create_model
from sit_atconv.sampling import SamplerSettings
from sit_atconv.sampling.draw import Drawing
from sit_atconv.study.table.calls import Calls, count_calls

NOISE = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1)


def lagrange(nodes: list[float], t: float, t_next: float) -> list[float]:
    """The definition: for each node, the integral of the polynomial that is 1 there and 0 at the others."""
    found = []
    for j, node in enumerate(nodes):
        basis = np.poly1d([1.0])
        for other in nodes[:j] + nodes[j + 1 :]:
            basis *= np.poly1d([1.0, -other]) / (node - other)
        integral = basis.integ()
        found.append(float(integral(t_next) - integral(t)))
    return found


@pytest.mark.parametrize(
    ("past", "expected"),
    [
        ([], [1]),
        ([-1], [-1 / 2, 3 / 2]),
        ([-2, -1], [5 / 12, -16 / 12, 23 / 12]),
        ([-3, -2, -1], [-9 / 24, 37 / 24, -59 / 24, 55 / 24]),
    ],
)
def test_weights_of_equal_steps_are_those_of_the_textbook(past: list[float], expected: list[float]) -> None:
    assert adams_weights(past, 0.0, 1.0) == pytest.approx(expected, abs=1e-13)
    backwards = adams_weights([0.5 - 0.02 * each for each in past], 0.5, 0.48)
    assert backwards == pytest.approx([-0.02 * each for each in expected], abs=1e-14)


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4), direction=st.sampled_from([1.0, -1.0]))
def test_weights_of_any_steps_are_integrals_of_lagranges_polynomials(steps: list[float], direction: float) -> None:
    *nodes, t_next = (0.3 + direction * np.cumsum([0.0, *steps])).tolist()
    assert adams_weights(nodes[:-1], nodes[-1], t_next) == pytest.approx(lagrange(nodes, nodes[-1], t_next), rel=1e-8)


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("method", ADAMS_ORDERS)
@pytest.mark.parametrize(("towards_data", "shift"), [(True, 1.0), (False, 1.0), (True, 3.0), (False, 0.4)])
def test_adams_has_its_order_on_even_and_uneven_grids(
    path: Interpolant, method: str, towards_data: bool, shift: float
) -> None:
    field = GaussianField(path)
    data = field.data_from_noise(NOISE)
    start, exact = (NOISE, data) if towards_data else (data, NOISE)
    options = {"start": float(towards_data), "end": float(not towards_data), "shift": shift}
    steps = 128 if path.time_range()[0] == 0 else 512  # VP's velocity bends sharply near data
    errors = [(integrate_ode(field, start, n, method, **options) - exact).abs().max() for n in (steps, 2 * steps)]
    assert 0.9 < (errors[0] / errors[1]).item() / 2 ** ADAMS_ORDERS[method] < 1.2


@dataclass
class SwitchedField:
    """A network for `guided_velocity`: label 0 is `GaussianField`, and the null class 1 has data of another mean.

    The velocity of a Gaussian is affine in its mean: guidance by s is the flow of the mean null + s (mean − null).
    """

    path: Interpolant
    other: float = -0.2
    calls: int = 0
    scale: float = 1.5

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        means = torch.tensor([MEAN, self.other], dtype=x.dtype)[y].view(-1, 1)
        a = self.path.alpha(t)
        centred = GaussianField(self.path)(x - a * (means - MEAN), t)  # the velocity relative to data of mean MEAN
        return centred + self.path.d_alpha(t) * (means - MEAN)

    def exact(self, x: Tensor, switch: float) -> Tensor:
        """From t = 1 to `switch` without guidance, from there to 0 with it: quantiles stay quantiles."""
        for t, t_next, mean in (
            (1.0, switch, MEAN),
            (switch, 0.0, self.other + self.scale * (MEAN - self.other)),
        ):
            (a, s), (b, r) = ((1 - each, each) for each in (t, t_next))
            x = b * mean + (x - a * mean) * (((b * STD) ** 2 + r**2) / ((a * STD) ** 2 + s**2)) ** 0.5
        return x

    def guided(self, interval: tuple[float, float]) -> Callable[..., Tensor]:
        labels = torch.zeros(len(NOISE), dtype=torch.int64)
        return guided_velocity(self, labels, self.scale, null_label=1, interval=interval)


@pytest.mark.parametrize("method", ADAMS_ORDERS)
def test_adams_keeps_its_order_across_a_switch(method: str) -> None:
    network = SwitchedField(Linear())
    exact = network.exact(NOISE, 0.5)
    velocity = network.guided((0.0, 0.5))
    errors = [(integrate_ode(velocity, NOISE, n, method) - exact).abs().max().item() for n in (128, 256)]
    assert 0.85 < errors[0] / errors[1] / 2 ** ADAMS_ORDERS[method] < 1.2


def test_a_history_across_the_switch_would_lose_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    network = SwitchedField(Linear())
    kept = integrate_ode(network.guided((0.0, 0.5)), NOISE, 128, "adams4")

    class Blind:
        """The same field, which does not tell that it changes."""

        def __init__(self) -> None:
            self.velocity, self.time = network.guided((0.0, 0.5)), 1.0

        def at_step(self, t: float) -> "Blind":
            self.time = t
            return self

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return at_step(self.velocity, self.time)(x, t)

    lost = integrate_ode(Blind(), NOISE, 128, "adams4")
    exact = network.exact(NOISE, 0.5)
    assert (lost - exact).abs().max() > 1000 * (kept - exact).abs().max()


@pytest.mark.parametrize(("method", "more", "at_once"), [("adams2", 1, 2), ("adams4", 4, 3)])
def test_calls_of_n_steps_and_of_every_switch(method: str, more: int, at_once: int) -> None:
    field = GaussianField(Linear())
    integrate_ode(field, NOISE, 10, method)
    assert field.calls == 10 + more
    field.calls = 0
    integrate_ode(field, NOISE, 1, method)
    assert field.calls == at_once
    network = SwitchedField(Linear())
    integrate_ode(network.guided((0.25, 0.65)), NOISE, 20, method)  # three pieces
    assert network.calls == 20 + 3 * more
    network.calls = 0
    integrate_ode(network.guided((0.0, 1.0)), NOISE, 20, method)
    assert network.calls == 20 + more


@pytest.mark.parametrize("method", ADAMS_ORDERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_no_step_asks_for_the_velocity_at_its_end(method: str, shift: float) -> None:
    field = Recorder(GaussianField(Linear()))
    integrate_ode(field, NOISE, 6, method, shift=shift)
    assert min(field.times) > 0
    starts = ode_times(6, 1.0, 0.0, shift)[:-1]
    asked = torch.stack(field.times)
    assert all((asked == t).sum() == 1 for t in starts)


def test_forms_of_the_fields_are_compared_by_what_they_are() -> None:
    """What `at_step` promises, of all fields of this package: equal where the form is, however deep it is wrapped."""
    guided = SwitchedField(Linear()).guided((0.2, 0.7))
    for velocity in (guided, velocity_from_prediction(guided, "noise", Linear())):
        assert at_step(velocity, 0.3) == at_step(velocity, 0.6)
        assert at_step(velocity, 0.8) == at_step(velocity, 0.9)
        assert at_step(velocity, 0.3) != at_step(velocity, 0.8)
        traced = VelocityAndTrace(velocity, torch.ones(3, 2), torch.float64)
        assert at_step(traced, 0.3) == at_step(traced, 0.6)
        assert at_step(traced, 0.3) != at_step(traced, 0.8)


@pytest.mark.parametrize("method", ADAMS_ORDERS)
def test_a_likelihood_by_adams(method: str) -> None:
    data = MEAN + STD * torch.randn(4, 3, dtype=torch.float64)
    field = GaussianField(Linear())
    bits = bits_per_dimension(field, data, 200, method)
    assert field.calls == 200 + {"adams2": 1, "adams4": 4}[method]
    torch.testing.assert_close(bits, field.bits(data), atol=1e-4 if method == "adams2" else 1e-7, rtol=0)


@pytest.mark.parametrize("method", ADAMS_ORDERS)
def test_a_sample_does_not_depend_on_its_batch(method: str) -> None:
    together = integrate_ode(GaussianField(Linear()), NOISE, 12, method)
    alone = torch.cat([integrate_ode(GaussianField(Linear()), row[None], 12, method) for row in NOISE])
    assert torch.equal(together, alone)
    model, rows = tiny_model(), [3, 0, 7, 5]
    chosen = SamplerSettings(method, 6, guidance=1.5, interval=(0.1, 0.6), shift=2.0)
    every = images_of(model, rows, chosen, batch_size=4)
    require_same_images(every, images_of(model, rows, chosen, batch_size=1))


class Mixture:
    """The exact velocity of the linear interpolant for three Gaussians of std 0.3 in the plane."""

    means = torch.tensor([[1.0, 0.5], [-1.0, 0.8], [0.0, -1.2]], dtype=torch.float64)
    std = 0.3

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        a = 1 - t
        variance = (a * self.std) ** 2 + t**2
        offsets = x[:, None] - a * self.means
        weights = torch.softmax(-offsets.square().sum(-1) / (2 * variance), 1)[..., None]
        offset, mean = (weights * offsets).sum(1), (weights * self.means).sum(1)
        return t / variance * offset - (mean + a * self.std**2 / variance * offset)


def test_adams2_reaches_heuns_error_with_half_the_calls() -> None:
    x = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = integrate_ode(Mixture(), x, 1000, "adams4")
    midpoint = integrate_ode(Mixture(), x, 1000, "midpoint")
    torch.testing.assert_close(exact, midpoint, atol=1e-4, rtol=0)  # two independent methods agree

    def error(method: str, steps: int) -> float:
        return (integrate_ode(Mixture(), x, steps, method) - exact).square().mean().sqrt().item()

    for steps in (10, 15, 20):  # Heun takes 2 · steps − 1 calls, adams2 steps + 1
        assert error("adams2", steps) < 1.1 * error("heun", steps)
    assert error("adams4", 36) < 0.15 * error("heun", 20)  # 40 calls, and 39


def test_the_sampler_counts_its_calls() -> None:
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    chosen = SamplerSettings("adams2", 10, guidance=1.5, interval=(0.0, 0.65))
    Drawing(model, chosen).latents([0], torch.zeros(1, dtype=torch.int64), 0)
    # Steps from 1, 0.9, 0.8 and 0.7 are not guided, and those from 0.6 on are; both pieces begin with two calls.
    assert seen == [1] * 5 + [2] * 7
    seen.clear()
    Drawing(model, replace(chosen, guidance=1.0, interval=(0.0, 1.0))).latents([0], torch.zeros(1).long(), 0)
    assert len(seen) == 11


def test_adams_keeps_its_history_under_both_kinds_of_guidance() -> None:
    model = create_model(
        "SiT-S/4", input_size=8, in_channels=1, num_classes=3, hidden_size=32, depth=3, num_heads=2, internal_block=1
    )
    both = {"guidance": 1.5, "internal_guidance": 1.4}
    assert count_calls(model, SamplerSettings("adams2", 10, **both)) == Calls(11, 11)
    limited = {"interval": (0.0, 0.65), "internal_interval": (0.35, 1.0)}  # each switch costs one call
    assert count_calls(model, SamplerSettings("adams2", 10, **both, **limited)).evaluations == 13
