"""Interpolants, predictions, losses and times against closed forms: for Gaussian data all expectations are known."""

import math
from collections.abc import Callable

import pytest
import torch
from flow_fields import INTERPOLANTS, MEAN, STD, GaussianField
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.flow import (
    PREDICTIONS,
    VP,
    Cosine,
    Interpolant,
    Linear,
    alignment_loss,
    create_interpolant,
    drop_labels,
    flow_matching_loss,
    guided_velocity,
    times_from_uniform,
    velocity_from_prediction,
)
from sit_atconv.flow.field import at_step, switch_times


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_interpolants_run_from_data_to_noise_with_the_right_derivatives(path: Interpolant) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.alpha(ends)[0], torch.tensor(1.0).double())
    torch.testing.assert_close(path.sigma(ends)[0], torch.tensor(0.0).double())
    assert path.alpha(ends)[1] < 0.01
    assert path.sigma(ends)[1] > 0.99
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (slope,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(derivative(t), slope)


def test_values_of_the_interpolants() -> None:
    t = torch.tensor(0.25, dtype=torch.float64)
    assert (Linear().alpha(t).item(), Linear().sigma(t).item()) == (0.75, 0.25)
    assert Cosine().alpha(t).item() == pytest.approx(math.cos(math.pi / 8))
    assert VP().alpha(t).item() == pytest.approx(math.exp(-0.25 * 19.9 / 16 - 0.0125))
    assert VP().alpha(t).item() ** 2 + VP().sigma(t).item() ** 2 == pytest.approx(1)


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_velocity_noise_score_and_data_follow_from_one_another(path: Interpolant) -> None:
    x, noise = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    x_t, v = path.interpolate(x, noise, t), path.velocity(x, noise, t)
    torch.testing.assert_close(path.noise_from_velocity(x_t, v, t), noise)
    torch.testing.assert_close(path.data_from_velocity(x_t, v, t), x)
    torch.testing.assert_close(path.score_from_velocity(x_t, v, t), -noise / path.sigma(t).view(6, 1, 1))
    torch.testing.assert_close(path.velocity_from_noise(x_t, noise, t), v)
    torch.testing.assert_close(path.velocity_from_data(x_t, x, t), v)
    torch.testing.assert_close(path.velocity_from_score(x_t, path.score_from_velocity(x_t, v, t), t), v)


def test_the_drift_variance_of_vp_is_finite_where_its_derivatives_are_not() -> None:
    path, zero = VP(), torch.zeros((), dtype=torch.float64)
    assert path.d_sigma(zero).isinf()
    assert path.drift_variance(zero).item() == pytest.approx(0.1 / 2)
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    torch.testing.assert_close(path.drift_variance(t), Interpolant.drift_variance(path, t))


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_times_keep_off_the_ends_that_are_singular(path: Interpolant, prediction: str) -> None:
    low, high = path.time_range(prediction)
    expected = {"velocity": (0.0, 1.0)}.get(prediction, (1e-3, 1 - 1e-3)) if path != VP() else (1e-5, 1.0)
    assert (low, high) == expected
    t = times_from_uniform(torch.tensor([0.0, 0.5, 1 - 1e-16]).double(), "uniform", path, prediction=prediction)
    assert t.tolist() == pytest.approx([low, (low + high) / 2, high], rel=1e-12)
    x_t = torch.ones(3, 1, dtype=torch.float64)
    assert velocity_from_prediction(lambda x, t: x, prediction, path)(x_t, t).isfinite().all()


def test_loss_is_the_mean_squared_error_of_each_sample_in_fp32() -> None:
    x, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.rand(3)
    seen = []

    def network(x_t: Tensor, times: Tensor) -> Tensor:
        seen.append((x_t, times))
        return torch.zeros_like(x_t, dtype=torch.bfloat16)

    loss = flow_matching_loss(network, x, noise, t)
    torch.testing.assert_close(loss, (noise - x).square().mean((1, 2, 3)))
    assert loss.dtype == torch.float32
    time = t.view(3, 1, 1, 1)
    torch.testing.assert_close(seen[0][0], (1 - time) * x + time * noise)
    perfect = flow_matching_loss(lambda x_t, t: noise - x, x, noise, t)
    assert perfect.max() == 0


def expectation(function: Callable[[Tensor, Tensor], Tensor]) -> float:
    """E f(x, ε) over data N(MEAN, STD²) and noise N(0, 1), exact for quadratic f: both have their two moments."""
    x = torch.tensor([MEAN - STD, MEAN - STD, MEAN + STD, MEAN + STD], dtype=torch.float64).view(4, 1)
    noise = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64).view(4, 1)
    return function(x, noise).mean().item()


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_the_exact_prediction_is_the_conditional_variance(path: Interpolant, prediction: str) -> None:
    exact = GaussianField(path)
    t = torch.full((4,), 0.3, dtype=torch.float64)
    a, s, da, ds = (f(t[0]).item() for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    spread = STD**2 / (a**2 * STD**2 + s**2)  # of data and noise, given x_t
    least = {"velocity": (da * s - a * ds) ** 2, "noise": a**2, "score": a**2, "data": s**2}[prediction] * spread

    def loss(scale: float, offset: float) -> float:
        def network(x: Tensor, t: Tensor) -> Tensor:
            return scale * exact.predict(prediction, x, t) + offset

        return expectation(lambda x, noise: flow_matching_loss(network, x, noise, t, path, prediction))

    assert loss(1.0, 0.0) == pytest.approx(least, rel=1e-12)
    for scale, offset in ((0.9, 0.0), (1.1, 0.0), (1.0, 0.1), (1.0, -0.1)):
        assert loss(scale, offset) > 1.001 * least


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_weightings_give_the_loss_of_the_velocity_and_of_the_score(path: Interpolant, prediction: str) -> None:
    x, noise, out = torch.randn(3, 5, 2, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64)

    def loss(weighting: str) -> Tensor:
        return flow_matching_loss(lambda x, t: out, x, noise, t, path, prediction, weighting)

    as_velocity = velocity_from_prediction(lambda x, t: out, prediction, path)
    torch.testing.assert_close(loss("velocity"), flow_matching_loss(as_velocity, x, noise, t, path))

    sigma = path.sigma(t).view(5, 1, 1, 1)
    score = out if prediction == "score" else -out / sigma
    of_score = path.drift_variance(t) * (score + noise / sigma).square().mean((1, 2, 3))
    torch.testing.assert_close(loss("likelihood"), of_score)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_in_half_precision_are_compared_in_fp32(prediction: str) -> None:
    x, noise, t = torch.randn(2, 16), torch.randn(2, 16), torch.tensor([0.1, 0.9])
    out = torch.randn(2, 16).bfloat16()
    loss = flow_matching_loss(lambda x, t: out, x, noise, t, prediction=prediction)
    wide = flow_matching_loss(lambda x, t: out.float(), x, noise, t, prediction=prediction)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wide)


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(), (4,)], ids=["scalar time", "a time for each sample"])
def test_every_prediction_becomes_the_same_velocity(path: Interpolant, prediction: str, shape: tuple[int, ...]) -> None:
    exact = GaussianField(path)
    low, high = path.time_range(prediction)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    converted = velocity_from_prediction(lambda x, t: exact.predict(prediction, x, t), prediction, path)
    for end in (low, 0.5, high):
        t = torch.full(shape, end, dtype=torch.float64)
        torch.testing.assert_close(converted(x, t), exact(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guiding_a_prediction_and_guiding_its_velocity_are_the_same(prediction: str) -> None:
    table = torch.randn(4, 3, 1, 1, dtype=torch.float64)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return table[y] * x

    def guided(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        labels = torch.tensor([0, 2])
        return guided_velocity(model, labels, 2.5, null_label=3, interval=(0.2, 0.6), channels=2)

    path, x = Cosine(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    guide_first = velocity_from_prediction(guided(model), prediction, path)
    convert_first = guided(velocity_from_prediction(model, prediction, path))
    assert switch_times(guide_first) == switch_times(convert_first) == (0.2, 0.6)
    values = []
    for decided_at in (0.9, 0.5):
        t = torch.tensor(0.5, dtype=torch.float64)
        ours, theirs = (at_step(velocity, decided_at)(x, t) for velocity in (guide_first, convert_first))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        values.append(ours)
    assert (values[0] - values[1]).abs().max() > 0.1  # at 0.9 there is no guidance


def test_alignment_is_minus_the_mean_cosine() -> None:
    a, b = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    expected = [
        -sum(torch.dot(u, v) / u.norm() / v.norm() for u, v in zip(x, y, strict=True)) / 5
        for x, y in zip(a, b, strict=True)
    ]
    torch.testing.assert_close(alignment_loss(a, b), torch.stack(expected))
    torch.testing.assert_close(alignment_loss(a, 3 * a), torch.full((2,), -1.0))
    tiny = torch.full((1, 1, 4), 1e-4, dtype=torch.float16)
    assert alignment_loss(tiny, tiny).item() == pytest.approx(-1)


@pytest.mark.parametrize("distribution", ["uniform", "logit-normal"])
@pytest.mark.parametrize("path", [Linear(), Cosine()])
def test_times_have_their_distribution(distribution: str, path: Interpolant) -> None:
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1]
    t = times_from_uniform(u, distribution, path)
    assert t.min() >= 0
    assert t.max() < 1
    assert t.median().item() == pytest.approx(0.5, abs=1e-3)
    if distribution == "logit-normal":
        odds = t / (1 - t) if isinstance(path, Linear) else torch.tan(t * math.pi / 2)
        assert odds[1:].log().std().item() == pytest.approx(1, abs=0.01)
    else:
        torch.testing.assert_close(t, u)


@given(shift=st.floats(0.1, 10), u=st.floats(0, 1, exclude_max=True))
def test_shifted_times_stay_in_range_and_keep_their_side(shift: float, u: float) -> None:
    t = times_from_uniform(torch.tensor([u], dtype=torch.float64), shift=shift).item()
    assert 0 <= t <= 1
    assert (t >= u - 1e-12) == (shift >= 1) or math.isclose(t, u, abs_tol=1e-12)


def test_labels_are_dropped_where_the_number_is_small() -> None:
    labels = torch.tensor([1, 2, 3])
    assert drop_labels(labels, torch.tensor([0.05, 0.1, 0.9]), 0.1, 10).tolist() == [10, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: create_interpolant("gvp"), "linear, cosine, vp"),
        (lambda f, x: times_from_uniform(x, "lognormal"), "did you mean 'logit-normal'"),
        (lambda f, x: times_from_uniform(x, shift=0.0), "shift must be positive"),
        (lambda f, x: times_from_uniform(x, "logit-normal", VP()), "linear and cosine"),
        (lambda f, x: flow_matching_loss(f, x, x, x[0], prediction="eps"), "Unknown prediction 'eps'"),
        (lambda f, x: flow_matching_loss(f, x, x, x[0], weighting="velocity"), "noise and score, not of velocity"),
        (lambda f, x: flow_matching_loss(f, x, x, x[0], None, "data", "likelihood"), "not of data: use none"),
        (lambda f, x: flow_matching_loss(f, x, x, x[0], None, "noise", "snr"), "Unknown weighting 'snr'"),
        (lambda f, x: velocity_from_prediction(f, "scores", Linear()), "did you mean 'score'"),
        (lambda f, x: Linear().time_range("x0"), "velocity, noise, score, data"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(lambda x, t: x, torch.zeros(1, 1))
