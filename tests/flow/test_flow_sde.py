"""SDE solvers against Gaussian data, whose moments follow exactly from the steps' coefficients."""

import math
from itertools import product

import pytest
import torch
from flow_fields import INTERPOLANTS, MEAN, STD, GaussianField
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.flow import (
    DIFFUSIONS,
    LAST_STEPS,
    PREDICTIONS,
    SDE_METHODS,
    VP,
    Cosine,
    Interpolant,
    Linear,
    NonFiniteError,
    integrate_ode,
    integrate_sde,
    velocity_from_prediction,
)
from sit_atconv.flow.finite import FiniteGuard


def moments_at_data(
    path: Interpolant, steps: int, method: str, prediction: str = "velocity", **options: str | float
) -> tuple[float, float]:
    """Mean and standard deviation that the solver gives for N(MEAN, STD²), without sampling error.

    Every step is affine in the state and in its noise. So the second row of the state holds coefficients, one for each
    independent normal that went in; the first row, where all of them are zero, holds what remains, the mean.
    """
    exact = GaussianField(path)
    basis = torch.eye(steps + 1, dtype=torch.float64)
    drawn = []

    def noise(step: int) -> Tensor:
        drawn.append(step)
        return torch.stack([torch.zeros(steps + 1), basis[step + 1]])

    out = integrate_sde(
        velocity_from_prediction(lambda x, t: exact.predict(prediction, x, t), prediction, path),
        torch.stack([torch.zeros(steps + 1).double(), basis[0]]),
        steps,
        method,
        interpolant=path,
        start=path.time_range(prediction)[1],
        noise=noise,
        **options,
    )
    with_noise = steps if options.get("last_step") == "none" else steps - 1
    assert drawn == list(range(with_noise))  # each step draws once
    assert exact.calls in (0, {"euler-maruyama": steps, "heun": 2 * steps - 1}[method])
    return out[0, 0].item(), (out[1] - out[0]).norm().item()


def moments_after_last_step(
    path: Interpolant, diffusion: str, last_step: str, scale: float, h: float = 0.04
) -> tuple[float, float]:
    """What the last step over [0, h] makes, by its definition, of the exact marginal at h: mean, standard deviation."""
    if last_step == "none":
        return MEAN, STD
    t = torch.tensor(h, dtype=torch.float64)
    a, s, da, ds = (f(t).item() for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    variance = (a * STD) ** 2 + s**2
    if last_step == "tweedie":  # the posterior mean varies less than the data
        return MEAN, a * STD**2 / variance**0.5
    slope = (a * da * STD**2 + s * ds) / variance  # of the velocity in x
    if last_step == "mean":
        slope += scale * DIFFUSIONS[diffusion](path, t).item() / variance
    return MEAN * (a - h * da), (1 - h * slope) * variance**0.5


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize(("method", "steps"), [("euler-maruyama", 250), ("heun", 150)])
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_every_diffusion_scale_and_last_step_lands_where_it_should(
    path: Interpolant, method: str, steps: int, diffusion: str
) -> None:
    for last_step, scale in [*product(LAST_STEPS, [1.0]), ("mean", 0.5), ("mean", 2.0)]:
        landed = moments_at_data(path, steps, method, diffusion=diffusion, last_step=last_step, diffusion_scale=scale)
        assert landed == pytest.approx(moments_after_last_step(path, diffusion, last_step, scale), rel=0.01)


def test_what_the_last_step_makes_is_the_data_but_where_diffusion_or_noise_is_still_large() -> None:
    off = set()
    for path, diffusion, last_step in product(INTERPOLANTS, DIFFUSIONS, LAST_STEPS):
        mean, std = moments_after_last_step(path, diffusion, last_step, 1.0)
        assert mean == pytest.approx(MEAN, rel=0.01)
        if abs(std / STD - 1) > 0.01:
            off.add((type(path), diffusion if last_step == "mean" else "any", last_step))
    # D = 1 at t = 0.04: the drift without its noise contracts by 6 to 7 %. VP still has a σ of 0.14 there.
    assert off == {
        (Linear, "constant", "mean"),
        (Cosine, "constant", "mean"),
        (VP, "constant", "mean"),
        (VP, "sigma", "mean"),
        (VP, "sbdm", "mean"),
        (VP, "any", "tweedie"),
    }
    assert moments_after_last_step(Linear(), "constant", "mean", 1.0)[1] == pytest.approx(0.933 * STD, rel=0.01)


@pytest.mark.parametrize(("method", "shrinks"), [("euler-maruyama", 2), ("heun", 4)])
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_moments_err_in_the_order_of_the_method(method: str, shrinks: float, diffusion: str) -> None:
    path = VP() if diffusion == "sbdm" else Linear()  # elsewhere sbdm is nearly singular at the start
    steps = 200 if method == "euler-maruyama" else 80
    options = {"diffusion": diffusion, "last_step": "none"}
    coarse, fine = (moments_at_data(path, n, method, **options)[1] - STD for n in (steps, 2 * steps))
    assert 0.85 * shrinks < coarse / fine < 1.3 * shrinks


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("prediction", PREDICTIONS[1:])
@pytest.mark.parametrize("method", SDE_METHODS)
def test_every_prediction_gives_the_sde_of_its_velocity(path: Interpolant, prediction: str, method: str) -> None:
    ours = moments_at_data(path, 40, method, prediction)
    assert ours == pytest.approx((MEAN, STD), rel=0.05)
    if path == VP():  # its grid starts at 1 for every prediction
        assert ours == pytest.approx(moments_at_data(path, 40, method), rel=1e-9)


@pytest.mark.parametrize("method", SDE_METHODS)
def test_samples_have_the_moments_of_the_data(method: str) -> None:
    x = integrate_sde(GaussianField(Linear()), torch.randn(20_000, 1), 100, method)
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(20_000))
    assert x.std().item() == pytest.approx(STD, rel=0.012 + 4 / math.sqrt(40_000))


@pytest.mark.parametrize(("sde", "ode"), [("euler-maruyama", "euler"), ("heun", "heun")])
def test_without_diffusion_the_sde_is_the_ode(sde: str, ode: str) -> None:
    field, noise = GaussianField(Linear()), torch.randn(4, 1, dtype=torch.float64)
    stochastic = integrate_sde(field, noise, 30, sde, diffusion_scale=0.0, last_step="none")
    torch.testing.assert_close(stochastic, integrate_ode(field, noise, 30, ode))


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_stay_finite_in_single_precision_too(path: Interpolant, steps: int) -> None:
    x = torch.randn(2, 3)
    for method, diffusion, last_step, dtype in product(
        SDE_METHODS, DIFFUSIONS, LAST_STEPS, (torch.float32, torch.float64)
    ):
        options = {"interpolant": path, "diffusion": diffusion, "last_step": last_step, "dtype": dtype}
        y = integrate_sde(GaussianField(path), x, steps, method, **options)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert y.isfinite().all()


def test_samples_that_stop_being_finite_are_named() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(torch.tensor([[False], [True]]) & (t < 0.55), torch.inf, x)

    with pytest.raises(NonFiniteError, match=r"step 6, from t = 0\.5, for sample 8: ") as raised:
        integrate_sde(network, torch.ones(2, 2), 10, last_step="none", samples=[7, 8])
    assert (raised.value.step, raised.value.rows) == (6, [1])


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_no_step_waits_for_the_device(method: str, last_step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there are no values: whatever looked at one would fail."""
    monkeypatch.setattr(FiniteGuard, "check", lambda self, times: None)  # the one look, after the last step
    x = torch.empty(2, 3, device="meta")
    y = integrate_sde(lambda x, t: x * t, x, 4, method, last_step=last_step, noise=lambda i: torch.randn(2, 3))
    assert (y.device.type, y.shape) == ("meta", (2, 3))


def test_the_callback_sees_every_step_and_may_change_the_state() -> None:
    seen = []

    def double(step: int, t: float, state: Tensor) -> Tensor:
        seen.append((step, t))
        return 2 * state

    still = {"diffusion_scale": 0.0, "last_step": "euler", "last_step_size": 0.25}
    x = integrate_sde(lambda x, t: 0 * x, torch.ones(1, 1), 4, **still, on_step=double)
    assert seen == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)]
    assert x.item() == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"method": "euler"}, "did you mean 'euler-maruyama'"),
        ({"diffusion": "sigmas"}, "did you mean 'sigma'"),
        ({"last_step": "last"}, "Unknown last step"),
        ({"diffusion_scale": -1.0}, "scale must be >= 0"),
        ({"last_step_size": 1.0}, "between 0 and the start"),
        ({"start": 1.5}, "at most 1"),
    ],
)
def test_bad_input_is_named(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        integrate_sde(lambda x, t: x, torch.zeros(1, 1), **options)
