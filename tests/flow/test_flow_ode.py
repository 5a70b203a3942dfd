"""ODE solvers against flows known in closed form: orders, network calls, independence of the batch, inversion."""

import pytest
import torch
from flow_fields import INTERPOLANTS, MEAN, STD, GaussianField, Recorder, two_bumps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchdiffeq import odeint

from sit_atconv.errors import InputError
from sit_atconv.flow import (
    ODE_METHODS,
    PREDICTIONS,
    Interpolant,
    Linear,
    NonFiniteError,
    guided_velocity,
    integrate_ode,
    invert,
    velocity_from_prediction,
)
from sit_atconv.flow.finite import FiniteGuard


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
@pytest.mark.parametrize("towards_data", [True, False])
def test_solvers_have_their_order(path: Interpolant, method: str, order: int, towards_data: bool) -> None:
    field = GaussianField(path)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1)
    data = field.data_from_noise(noise)
    start, exact = (noise, data) if towards_data else (data, noise)
    ends = {"start": float(towards_data), "end": float(not towards_data)}
    # VP's velocity bends sharply near data: its order shows at finer steps.
    steps = 64 if path.time_range()[0] == 0 else 512
    errors = [(integrate_ode(field, start, n, method, **ends) - exact).abs().max() for n in (steps, 2 * steps)]
    ratio = (errors[0] / errors[1]).item()
    assert ratio > 0.9 * 2**order
    if (method, path) != ("midpoint", Linear()):  # there its second-order error happens to cancel
        assert ratio < 1.2 * 2**order


@pytest.mark.parametrize(
    ("method", "towards_data", "towards_noise"), [("euler", 10, 10), ("heun", 19, 20), ("midpoint", 20, 20)]
)
def test_evaluations_of_n_steps(method: str, towards_data: int, towards_noise: int) -> None:
    field = GaussianField(Linear())
    integrate_ode(field, torch.randn(2, 1), 10, method)
    assert field.calls == towards_data
    invert(field, torch.randn(2, 1), 10, method)
    assert field.calls == towards_data + towards_noise


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", ODE_METHODS)
def test_every_prediction_is_integrated_to_the_data(path: Interpolant, prediction: str, method: str) -> None:
    exact = GaussianField(path)
    low, high = path.time_range(prediction)
    asked = Recorder(lambda x, t: exact.predict(prediction, x, t))
    velocity = velocity_from_prediction(asked, prediction, path)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1)
    data = integrate_ode(velocity, noise, 100, method, start=high, end=low)
    # What is left out, 0.1 % at each end, and the error of the solver
    tolerance = 0.03 if method == "euler" else 0.004
    torch.testing.assert_close(data, exact.data_from_noise(noise), atol=tolerance, rtol=0)
    times = torch.cat([t.reshape(-1) for t in asked.times])
    assert (times.min() >= low, times.max() <= high) == (True, True)


@pytest.mark.parametrize("method", ["midpoint", "heun", "dopri5"])
@pytest.mark.parametrize("path", INTERPOLANTS)
def test_data_to_noise_to_data_returns_the_data(path: Interpolant, method: str) -> None:
    low, high = path.time_range()
    field = GaussianField(path)
    data = MEAN + STD * torch.randn(5, 2, dtype=torch.float64)
    tight = {"atol": 1e-9, "rtol": 1e-9, "start": low, "end": high}
    noise = invert(field, data, 400, method, **tight)
    tolerance = 1e-6 if method == "dopri5" else 1e-3
    torch.testing.assert_close(noise, field.noise_from_data(data), atol=max(tolerance, 10 * low), rtol=0)
    back = integrate_ode(field, noise, 400, method, **{**tight, "start": high, "end": low})
    torch.testing.assert_close(back, data, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0), (0.999, 0.001)])
def test_a_shift_moves_the_grid_and_keeps_its_ends(start: float, end: float) -> None:
    field = Recorder(lambda x, t: x)
    integrate_ode(field, torch.zeros(1), 4, "euler", shift=3.0, start=start, end=end)
    descending = [1.0, 0.9, 0.75, 0.5, 0.0]
    expected = descending[:4] if start > end else descending[:0:-1]
    low, high = sorted((start, end))
    assert [t.item() for t in field.times] == pytest.approx([low + (high - low) * u for u in expected])


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize(("atol", "rtol"), [(1e-6, 1e-3), (1e-8, 1e-8)])
def test_dopri5_takes_torchdiffeqs_steps(start: float, end: float, atol: float, rtol: float) -> None:
    x = torch.tensor([[0.31, -0.2, 1.4]], dtype=torch.float64)
    ours, theirs = Recorder(two_bumps), Recorder(two_bumps)
    result = integrate_ode(ours, x, method="dopri5", atol=atol, rtol=rtol, start=start, end=end)
    ends = torch.tensor([start, end], dtype=torch.float64)
    tolerance = {"atol": atol, "rtol": rtol, "options": {"ifactor": 5.0}}
    oracle = odeint(lambda t, x: theirs(x, t.reshape(1)), x, ends, method="dopri5", **tolerance)[-1]
    # Until it steps beyond the end, which ours does not
    beyond = next(i for i, t in enumerate(theirs.times) if not 0 <= t <= 1)
    common = beyond - (beyond - 2) % 6
    assert common >= 20
    torch.testing.assert_close(torch.cat(ours.times)[:common], torch.cat(theirs.times)[:common], atol=1e-7, rtol=0)
    assert all(0 <= t <= 1 for t in ours.times)
    torch.testing.assert_close(result, oracle, atol=100 * atol, rtol=min(100 * rtol, 1e-2))


def test_a_sample_of_dopri5_does_not_depend_on_its_batch() -> None:
    x = torch.tensor([[1e-3, 0.5], [2.0, -1.0], [0.02, 1e-9], [-3.0, 0.0]], dtype=torch.float64)
    together = integrate_ode(two_bumps, x, method="dopri5")
    alone = torch.cat([integrate_ode(two_bumps, row[None], method="dopri5") for row in x])
    assert torch.equal(together, alone)

    def joint(x: Tensor) -> Tensor:
        ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
        return odeint(lambda t, x: two_bumps(x, t), x, ends, method="dopri5", atol=1e-6, rtol=1e-3)[-1]

    assert (joint(x) - torch.cat([joint(row[None]) for row in x])).abs().max() > 1e-5  # a common step would


def test_the_rounding_of_the_network_does_not_decide_the_steps_of_dopri5() -> None:
    x = torch.randn(2, 1024, dtype=torch.float64)

    def rounded(x: Tensor, t: Tensor) -> Tensor:
        """As from a network in fp32 that sums in another order whenever it is called."""
        return GaussianField(Linear())(x, t) + 1e-6 * torch.randn_like(x)

    exact = integrate_ode(GaussianField(Linear()), x, method="dopri5")
    torch.testing.assert_close(integrate_ode(rounded, x, method="dopri5"), exact, atol=1e-5, rtol=0)


def test_dopri5_reaches_its_tolerance() -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1)
    for path in INTERPOLANTS:
        exact = GaussianField(path).data_from_noise(noise)
        for tolerance, reached in ((1e-3, 5e-3), (1e-10, 1e-8)):
            ours = integrate_ode(GaussianField(path), noise, method="dopri5", atol=tolerance * 1e-3, rtol=tolerance)
            torch.testing.assert_close(ours, exact, atol=reached, rtol=0)


def label_speed(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A network whose output is its label: v = y everywhere."""
    return y.to(x.dtype).view(-1, 1).expand_as(x)


@pytest.mark.parametrize("interval", [(0.2, 0.7), (0.0, 0.7), (0.35, 1.0)])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0)])
def test_dopri5_stops_where_guidance_begins_and_ends(interval: tuple[float, float], start: float, end: float) -> None:
    calls: list[tuple[Tensor, int]] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append((t, len(x)))
        return label_speed(x, t, y)

    velocity = guided_velocity(model, torch.tensor([1, 2]), 3.0, null_label=5, interval=interval)
    moved = integrate_ode(velocity, torch.zeros(2, 1).double(), method="dopri5", start=start, end=end)
    inside = interval[1] - interval[0]
    labels = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    expected = labels * (1 - inside) + (5 + 3 * (labels - 5)) * inside
    torch.testing.assert_close(moved, (end - start) * expected, atol=1e-12, rtol=0)
    low, high = interval
    for t, batch in calls:  # at the ends themselves, both pieces ask
        assert batch == 2 or (low <= t.min() and t.max() <= high)
        assert batch == 4 or t.max() <= low or t.min() >= high


@pytest.mark.parametrize("method", ODE_METHODS)
def test_the_network_sees_its_own_dtype_and_the_state_is_double(method: str) -> None:
    seen = set()

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.add((x.dtype, t.dtype, tuple(t.shape)))
        return -x

    out = integrate_ode(network, torch.ones(2, 3), 5, method)
    assert seen == {(torch.float32, torch.float64, (2,) if method == "dopri5" else ())}
    assert out.dtype == torch.float32


@pytest.mark.parametrize("method", ODE_METHODS)
def test_samples_that_stop_being_finite_are_named(method: str) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        broken = torch.tensor([False, True, False, True, False]) & (t < 0.5)
        return torch.where(broken.view(5, 1), torch.nan, x)

    with pytest.raises(NonFiniteError, match="samples 21, 23") as raised:
        integrate_ode(network, torch.ones(5, 2), 10, method, samples=range(20, 25))
    assert raised.value.rows == [1, 3]
    assert raised.value.time == pytest.approx(0.5, abs=0.11)
    if method in ("euler", "heun", "midpoint"):
        assert raised.value.step == {"euler": 7, "heun": 6, "midpoint": 6}[method]


def test_a_network_that_gives_nan_at_once_is_asked_twice_by_dopri5() -> None:
    network = Recorder(lambda x, t: x * torch.nan)
    with pytest.raises(NonFiniteError, match="step 1, from t = 1, for samples 0 to 2 of the batch"):
        integrate_ode(network, torch.ones(3, 2), method="dopri5")
    assert len(network.times) == 2


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "adams2", "adams4"])
def test_no_step_waits_for_the_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there are no values: whatever looked at one would fail."""
    monkeypatch.setattr(FiniteGuard, "check", lambda self, times: None)  # the one look, after the last step
    velocity = velocity_from_prediction(lambda x, t: x * t, "noise", Linear())
    x = integrate_ode(velocity, torch.empty(2, 3, device="meta"), 4, method, start=0.999, end=0.001)
    assert (x.device.type, x.shape) == ("meta", (2, 3))


def test_the_callback_sees_every_step_and_may_change_the_state() -> None:
    seen = []

    def double(step: int, t: float, state: Tensor) -> Tensor:
        seen.append((step, t))
        return 2 * state

    x = integrate_ode(lambda x, t: 0 * x, torch.ones(1, 1), 4, on_step=double)
    assert seen == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)]
    assert x.item() == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dopri5", "on_step": lambda step, t, x: x}, "separate steps for each sample"),
        ({"method": "eulr"}, "did you mean 'euler'"),
        ({"steps": 0}, "at least one step"),
        ({"shift": 0.0}, "shift must be positive"),
        ({"start": 1.5}, r"two different times in \[0, 1\]"),
        ({"start": 0.0}, "not 0.0 and 0.0"),
    ],
)
def test_bad_input_is_named(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        integrate_ode(lambda x, t: x, torch.zeros(1, 1), **options)


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(1, 7), batch=st.integers(0, 4), shape=st.lists(st.integers(1, 4), max_size=3))
def test_solvers_keep_the_shape(steps: int, batch: int, shape: list[int]) -> None:
    x = torch.randn(batch, *shape)
    for method in ODE_METHODS:
        y = integrate_ode(GaussianField(Linear()), x, steps, method)
        assert y.shape == x.shape
        assert y.isfinite().all()
