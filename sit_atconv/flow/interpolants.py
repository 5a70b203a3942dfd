"""Interpolants between data and noise: x_t = α(t)·x + σ(t)·ε, t = 0 data, t = 1 noise (SiT, arXiv 2401.08740, §2)."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sit_atconv.errors import require_one_of


def match_dims(t: Tensor, x: Tensor) -> Tensor:
    """Times t, a scalar or (B,), shaped to broadcast against x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


class Interpolant(ABC):
    """α, σ and their derivatives as functions of a tensor of times, and what follows from them.

    In all methods x, noise and velocities are (B, ...) and t is a scalar tensor or (B,).
    """

    t_min: float = 0.0  # training times stay at or above it, where the velocity is finite

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor: ...

    def interpolate(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = α x + σ ε."""
        t = match_dims(t, x)
        return self.alpha(t) * x + self.sigma(t) * noise

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = α' x + σ' ε, what the network learns to predict."""
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
    """α = exp(−¼(β₁−β₀)t² − ½β₀t), σ = √(1−α²): the variance-preserving diffusion of Song et al. 2021."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min = 1e-5  # σ' is infinite at 0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (self.beta_max - self.beta_min) * t**2 - 0.5 * self.beta_min * t

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * (0.5 * (self.beta_max - self.beta_min) * t + 0.5 * self.beta_min)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)


INTERPOLANTS: dict[str, type[Interpolant]] = {"linear": Linear, "cosine": Cosine, "vp": VP}


def create_interpolant(name: str) -> Interpolant:
    """The interpolant called "linear", "cosine" or "vp"; `InputError` for other names."""
    require_one_of(name, INTERPOLANTS, "interpolant")
    return INTERPOLANTS[name]()
