"""Fields whose integral is known in closed form, and counters of network calls, for the tests of flow."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sit_atconv.flow import VP, Cosine, Interpolant, Linear
from sit_atconv.flow.field import match_dims

INTERPOLANTS = [Linear(), Cosine(), VP()]
MEAN, STD = 0.7, 0.8


@dataclass
class GaussianField:
    """The exact velocity E[v | x_t] for data N(MEAN, STD²), elementwise, and what else is known then."""

    path: Interpolant
    calls: int = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        a, s, da = (match_dims(f(t), x) for f in (self.path.alpha, self.path.sigma, self.path.d_alpha))
        # σσ' = −αα' wherever α² + σ² = 1, which is finite at t = 0 where VP's σ' is not.
        s_ds = match_dims(t, x) if isinstance(self.path, Linear) else -a * da
        return da * MEAN + (a * da * STD**2 + s_ds) / (a**2 * STD**2 + s**2) * (x - a * MEAN)

    def predict(self, prediction: str, x: Tensor, t: Tensor) -> Tensor:
        """The exact conditional expectation of what `prediction` names."""
        a, s = match_dims(self.path.alpha(t), x), match_dims(self.path.sigma(t), x)
        whitened = (x - a * MEAN) / (a**2 * STD**2 + s**2)
        exact = {"noise": s * whitened, "score": -whitened, "data": MEAN + a * STD**2 * whitened}
        return self(x, t) if prediction == "velocity" else exact[prediction]

    def noise_from_data(self, x: Tensor) -> Tensor:
        """Where the ODE carries data: quantiles of N(MEAN, STD²) to those of the marginal at t = 1."""
        a, s = (f(torch.ones((), dtype=x.dtype)) for f in (self.path.alpha, self.path.sigma))
        return a * MEAN + (x - MEAN) / STD * (a**2 * STD**2 + s**2).sqrt()

    def data_from_noise(self, x: Tensor) -> Tensor:
        """The inverse of `noise_from_data`."""
        a, s = (f(torch.ones((), dtype=x.dtype)) for f in (self.path.alpha, self.path.sigma))
        return MEAN + STD * (x - a * MEAN) / (a**2 * STD**2 + s**2).sqrt()

    def bits(self, x: Tensor) -> Tensor:
        """−log₂ of the density that the ODE and the prior N(0, I) give to data, per element."""
        slope = self.noise_from_data(torch.ones(()).double()) - self.noise_from_data(torch.zeros(()).double())
        nats = self.noise_from_data(x) ** 2 / 2 + math.log(2 * math.pi) / 2 - slope.log()
        return nats.flatten(1).mean(1) / math.log(2)


def two_bumps(x: Tensor, t: Tensor) -> Tensor:
    """The exact velocity of the linear interpolant for a mixture of N(±1, 0.05²): hard near the watershed x = 0."""
    t = match_dims(t, x)
    a, variance = 1 - t, ((1 - t) * 0.05) ** 2 + t**2
    bump = torch.tanh(a * x / variance)  # E[±1 | x_t]
    data = bump + a * 0.05**2 / variance * (x - a * bump)
    noise = t / variance * (x - a * bump)
    return noise - data


@dataclass
class Recorder:
    """A field that keeps the times and batch sizes it was asked for."""

    field: object
    times: list[Tensor] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(t.clone())
        self.batches.append(len(x))
        return self.field(x, t)
