"""Interpolants between data and noise: x_t = α(t)·x + σ(t)·ε, t = 0 data, t = 1 noise (SiT, arXiv 2401.08740, §2)."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sit_atconv.errors import require_one_of
from sit_atconv.flow.field import match_dims

PREDICTIONS = ("velocity", "noise", "score", "data")


class Interpolant(ABC):
    """α, σ and their derivatives as functions of a tensor of times, and the conversions that follow from them.

    In all methods x, noise and velocities are (B, ...) and t is a scalar tensor or (B,).
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """α(t), of t's shape."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """σ(t), of t's shape."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """α'(t), of t's shape."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """σ'(t), of t's shape."""

    def time_range(self, prediction: str = "velocity") -> tuple[float, float]:
        """Times (low, high) within which a network with this prediction is trained and evaluated.

        [0, 1] for the velocity. Converting the others to a velocity is singular at t = 0 (data) or t = 1 (noise,
        score), so their range ends 1e-3 before both ends, as in SiT.
        """
        require_one_of(prediction, PREDICTIONS, "prediction")
        return (0.0, 1.0) if prediction == "velocity" else (1e-3, 1 - 1e-3)

    def drift(self, t: Tensor) -> Tensor:
        """α'/α. Infinite at t = 1 where α = 0 (linear, cosine)."""
        return self.d_alpha(t) / self.alpha(t)

    def drift_variance(self, t: Tensor) -> Tensor:
        """g = σσ' − (α'/α)σ²: v = (α'/α)·x_t − g·score. Infinite at t = 1 where α = 0 (linear, cosine)."""
        sigma = self.sigma(t)
        return sigma * self.d_sigma(t) - self.drift(t) * sigma**2

    def interpolate(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = α x + σ ε."""
        t = match_dims(t, x)
        return self.alpha(t) * x + self.sigma(t) * noise

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = α' x + σ' ε."""
        t = match_dims(t, x)
        return self.d_alpha(t) * x + self.d_sigma(t) * noise

    def noise_from_velocity(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """ε = (α v − α' x_t) / (α σ' − α' σ). For VP the denominator vanishes at t = 1, and σ' is infinite at t = 0."""
        t = match_dims(t, x_t)
        alpha, d_alpha = self.alpha(t), self.d_alpha(t)
        return (alpha * velocity - d_alpha * x_t) / (alpha * self.d_sigma(t) - d_alpha * self.sigma(t))

    def score_from_velocity(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x_t) = −ε / σ. Infinite at t = 0, where σ = 0."""
        return -self.noise_from_velocity(x_t, velocity, t) / self.sigma(match_dims(t, x_t))

    def data_from_velocity(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """x = (x_t − σ ε) / α, Tweedie's estimate of the data. Infinite at t = 1 where α = 0 (linear, cosine)."""
        noise = self.noise_from_velocity(x_t, velocity, t)
        t = match_dims(t, x_t)
        return (x_t - self.sigma(t) * noise) / self.alpha(t)

    def velocity_from_noise(self, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = (α'/α) x_t + (σ' − (α'/α) σ) ε. Singular at t = 1 (linear, cosine), and at t = 0 for VP."""
        t = match_dims(t, x_t)
        drift = self.drift(t)
        return drift * x_t + (self.d_sigma(t) - drift * self.sigma(t)) * noise

    def velocity_from_score(self, x_t: Tensor, score: Tensor, t: Tensor) -> Tensor:
        """v = (α'/α) x_t − g·score, g the drift variance. Singular at t = 1 (linear, cosine)."""
        t = match_dims(t, x_t)
        return self.drift(t) * x_t - self.drift_variance(t) * score

    def velocity_from_data(self, x_t: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """v = (σ'/σ) x_t + (α' − (σ'/σ) α) x. Singular at t = 0."""
        t = match_dims(t, x_t)
        growth = self.d_sigma(t) / self.sigma(t)
        return growth * x_t + (self.d_alpha(t) - growth * self.alpha(t)) * data


@dataclass(frozen=True)
class Linear(Interpolant):
    """α = 1 − t, σ = t: straight paths."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class Cosine(Interpolant):
    """α = cos(πt/2), σ = sin(πt/2): variance preserving. SiT calls it GVP."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * math.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * math.pi / 2)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(t * math.pi / 2)

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(t * math.pi / 2)


@dataclass(frozen=True)
class VP(Interpolant):
    """α = exp(−¼(β₁−β₀)t² − ½β₀t), σ = √(1−α²): the variance-preserving diffusion of Song et al. 2021.

    σ' is infinite at t = 0. α stays positive up to t = 1, so nothing is singular there.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def time_range(self, prediction: str = "velocity") -> tuple[float, float]:
        """[1e-5, 1] for every prediction: σ' is infinite at t = 0, and nothing is singular at t = 1."""
        require_one_of(prediction, PREDICTIONS, "prediction")
        return 1e-5, 1.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (self.beta_max - self.beta_min) * t**2 - 0.5 * self.beta_min * t

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def drift(self, t: Tensor) -> Tensor:
        """α'/α = −½β(t), finite everywhere."""
        return -0.5 * (self.beta_max - self.beta_min) * t - 0.5 * self.beta_min

    def drift_variance(self, t: Tensor) -> Tensor:
        """½β(t): σσ' = −αα' is finite where σ' is not."""
        return -self.drift(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.drift(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)


INTERPOLANTS: dict[str, type[Interpolant]] = {"linear": Linear, "cosine": Cosine, "vp": VP}


def create_interpolant(name: str) -> Interpolant:
    """The interpolant called "linear", "cosine" or "vp"; `InputError` for other names."""
    require_one_of(name, INTERPOLANTS, "interpolant")
    return INTERPOLANTS[name]()
