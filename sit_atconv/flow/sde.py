"""Stochastic solvers: dx = (v − D(t)·score) dt + √(2D(t)) dW, from noise (t = 1) to data (SiT, §2.4 and §3.3).

Every D gives the same marginals. Velocity and score come from one network evaluation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.flow.field import OnStep, Velocity, at_step, widened
from sit_atconv.flow.finite import FiniteGuard
from sit_atconv.flow.interpolants import Interpolant, Linear
from sit_atconv.flow.ode import require_steps, solver_dtype

SDE_METHODS = ("euler-maruyama", "heun")
LAST_STEPS = ("mean", "tweedie", "euler", "none")
DIFFUSIONS: dict[str, Callable[[Interpolant, Tensor], Tensor]] = {
    "sigma": lambda interpolant, t: interpolant.sigma(t),  # REPA's w = 2t for the linear interpolant
    "constant": lambda interpolant, t: torch.ones_like(t),
    "linear": lambda interpolant, t: t,
    "decreasing": lambda interpolant, t: 0.25 * (1 - torch.cos(math.pi * t)) ** 2,
    "increasing-decreasing": lambda interpolant, t: torch.sin(math.pi * t) ** 2,
    "sbdm": lambda interpolant, t: interpolant.drift_variance(t),
}


def sde_times(steps: int, start: float, last_step: str, last_step_size: float) -> Tensor:
    """The grid of N intervals: linspace(start, last_step_size, N) and then 0, in fp64 on the CPU.

    Raises `InputError` for an unknown last step, N < 1, or unless 0 < last_step_size < start <= 1.
    """
    require_one_of(last_step, LAST_STEPS, "last step")
    require_steps(steps)
    if not 0 < last_step_size < start <= 1:
        raise InputError(
            f"The last step's size must lie between 0 and the start time, which is at most 1: {last_step_size} was "
            f"given, with a start time of {start}."
        )
    if last_step == "none":
        return torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    if steps == 1:
        return torch.tensor([start, 0.0], dtype=torch.float64)
    return torch.cat([torch.linspace(start, last_step_size, steps, dtype=torch.float64), torch.zeros(1).double()])


def diffusion_at(times: Tensor, interpolant: Interpolant, name: str, scale: float) -> list[float]:
    """`scale` times the diffusion D called `name` at each of `times` (N,).

    Raises `InputError` for an unknown name or a negative scale.
    """
    require_one_of(name, DIFFUSIONS, "diffusion")
    if scale < 0:
        raise InputError(f"The diffusion scale must be >= 0, not {scale}.")
    return (scale * DIFFUSIONS[name](interpolant, times)).tolist()


def integrate_sde(
    velocity: Velocity,
    x: Tensor,
    steps: int = 250,
    method: str = "euler-maruyama",
    *,
    interpolant: Interpolant | None = None,
    start: float = 1.0,
    diffusion: str = "sigma",
    diffusion_scale: float = 1.0,
    last_step: str = "mean",
    last_step_size: float = 0.04,
    noise: Callable[[int], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    samples: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Solve the SDE from t = 1 to t = 0 in N steps; returns samples of x's shape and dtype.

    Args:
        velocity: callable of (x, t), where t is a scalar tensor on the CPU and x has its own dtype.
        x: noise at t = 1, (B, ...).
        method: "euler-maruyama" (N network evaluations, weak order 1) or "heun" (2N−1, weak order 2).
        interpolant: of the network's training, `Linear()` when not given.
        start: `interpolant.time_range(prediction)[1]`, which is below 1 where a prediction is singular there. For sbdm,
            and for Tweedie's estimate from pure noise, it is lowered to that of the score.
        diffusion: D(t), a name in `DIFFUSIONS`, times `diffusion_scale`.
        last_step: over [0, last_step_size]: "mean" (without noise; samples vary too little if D is large), "tweedie"
            (the estimate of the data), "euler" (an ODE step), or "none" (N equal steps, all with noise).
        noise: step number -> standard normal tensor of x's shape; torch's global generator when not given.
        dtype: of state and time grid; fp64 where the device supports it.
        samples: numbers of the samples, for the message of `NonFiniteError`.
        on_step: called after every step; it may change the state.

    Raises:
        InputError: for unknown names, steps < 1, a negative scale, or unless 0 < last_step_size < start <= 1.
        NonFiniteError: when states become NaN or infinite.
    """
    interpolant = interpolant or Linear()
    require_one_of(method, SDE_METHODS, "SDE solver")
    if diffusion == "sbdm" or (steps == 1 and last_step == "tweedie"):
        start = min(start, interpolant.time_range("score")[1])
    times = sde_times(steps, start, last_step, last_step_size)
    D = diffusion_at(times, interpolant, diffusion, diffusion_scale)
    dtype, noise = dtype or solver_dtype(x.device), noise or (lambda step: torch.randn_like(x))
    sde = _DiscreteSde(interpolant, times.to(dtype), D)
    guard, state, starts = FiniteGuard(x, samples), x.to(dtype), times[:-1].tolist()
    for i, t in enumerate(starts):
        field = widened(at_step(velocity, t), x.dtype, dtype)
        final = i == steps - 1
        if final and last_step != "none":
            state = sde.last_step(field, state, last_step)
        else:
            normal = noise(i).to(state.device, dtype, non_blocking=True)
            state = sde.step(field, state, i, normal, heun=method == "heun" and not final)
        guard.watch(i, state)
        if on_step is not None:
            state = on_step(i, times[i + 1].item(), state)
    guard.check(starts)
    return state.to(x.dtype)


@dataclass(frozen=True)
class _DiscreteSde:
    """The solvers' steps on a grid of N+1 times, for fields of (x, t).

    `times` and D are on the CPU, so that scalars taken from them never wait for the device.
    """

    interpolant: Interpolant
    times: Tensor
    D: list[float]

    def step(self, field: Velocity, x: Tensor, i: int, normal: Tensor, heun: bool) -> Tensor:
        """Euler-Maruyama's step, or Heun's for additive noise (Kloeden & Platen 1992, §15.1), of weak order 2.

        The noise of Heun's step uses the mean of D at both ends of the step. SiT's Heun adds the noise first, with D at
        the start, which leaves an error of first order.
        """
        h = (self.times[i] - self.times[i + 1]).item()
        drift = self._drift(field, x, i)
        if not heun:
            return x - h * drift + math.sqrt(2 * self.D[i] * h) * normal
        increment = math.sqrt((self.D[i] + self.D[i + 1]) * h) * normal
        return x - h / 2 * (drift + self._drift(field, x - h * drift + increment, i + 1)) + increment

    def last_step(self, field: Velocity, x: Tensor, how: str) -> Tensor:
        h = self.times[-2].item()
        if how == "mean":
            return x - h * self._drift(field, x, -2)
        v = field(x, self.times[-2])
        return x - h * v if how == "euler" else self.interpolant.data_from_velocity(x, v, self.times[-2])

    def _drift(self, field: Velocity, x: Tensor, i: int) -> Tensor:
        """v − D·score, from one evaluation of the field."""
        v = field(x, self.times[i])
        return v - self.D[i] * self.interpolant.score_from_velocity(x, v, self.times[i])
