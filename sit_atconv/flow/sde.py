"""Stochastic solver: dx = (v − D(t)·score) dt + √(2D(t)) dW, run from noise (t = 1) to data (SiT, §2.4 and §3.3).

Every D gives the same marginals; velocity and score come from one network call.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.flow.guidance import Velocity, at_step
from sit_atconv.flow.interpolants import Interpolant, Linear
from sit_atconv.flow.ode import require_steps, solver_dtype

LAST_STEPS = ("mean", "tweedie", "euler", "none")
DIFFUSIONS: dict[str, Callable[[Interpolant, Tensor], Tensor]] = {
    "sigma": lambda interpolant, t: interpolant.sigma(t),  # REPA's w = 2t for the linear interpolant
    "constant": lambda interpolant, t: torch.ones_like(t),
    "linear": lambda interpolant, t: t,
    "decreasing": lambda interpolant, t: 0.25 * (1 - torch.cos(math.pi * t)) ** 2,
    "increasing-decreasing": lambda interpolant, t: torch.sin(math.pi * t) ** 2,
    "sbdm": lambda interpolant, t: (
        interpolant.sigma(t) * interpolant.d_sigma(t)
        - interpolant.d_alpha(t) / interpolant.alpha(t) * interpolant.sigma(t) ** 2
    ),
}


def sde_times(steps: int, diffusion: str, last_step: str, last_step_size: float) -> Tensor:
    """The grid of N intervals: linspace(1, last_step_size, N) and then 0, in fp64 on the CPU.

    sbdm, and Tweedie's estimate from pure noise, are singular at t = 1 for the linear and cosine interpolants: there
    the grid starts at 1 − 1e-3.
    """
    singular = diffusion == "sbdm" or (steps == 1 and last_step == "tweedie")
    start = 1 - 1e-3 if singular else 1.0
    if last_step == "none":
        return torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    if steps == 1:
        return torch.tensor([start, 0.0], dtype=torch.float64)
    return torch.cat([torch.linspace(start, last_step_size, steps, dtype=torch.float64), torch.zeros(1).double()])


def integrate_sde(
    velocity: Velocity,
    x: Tensor,
    steps: int = 250,
    *,
    interpolant: Interpolant | None = None,
    diffusion: str = "sigma",
    diffusion_scale: float = 1.0,
    last_step: str = "mean",
    last_step_size: float = 0.04,
    noise: Callable[[int], Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Euler-Maruyama from t = 1 to t = 0 with N steps and N network calls; returns samples of x's shape and dtype.

    Args:
        velocity: callable of (x, t) with t a scalar tensor; x arrives in its own dtype.
        x: noise at t = 1, (B, ...).
        interpolant: what the network was trained with, `Linear()` when not given.
        diffusion: D(t), a name in `DIFFUSIONS`, times `diffusion_scale`.
        last_step: over [0, last_step_size]: "mean" (the drift without noise; too narrow where D is still large, as
            the constant one is), "tweedie" (the estimate of the data),
            "euler" (the ODE's step), or "none" (no special step: N equal ones, all with noise).
        noise: step number -> standard normal tensor of x's shape; torch's global generator when not given.
        dtype: of state and time grid; fp64 where the device has it.

    Raises:
        InputError: for unknown names, steps < 1, a negative scale or a last step outside (0, 1).
    """
    interpolant = interpolant or Linear()
    require_one_of(diffusion, DIFFUSIONS, "diffusion")
    require_one_of(last_step, LAST_STEPS, "last step")
    require_steps(steps)
    if diffusion_scale < 0 or not 0 < last_step_size < 1:
        raise InputError("The diffusion scale must be >= 0 and the last step's size between 0 and 1.")
    dtype = dtype or solver_dtype(x.device)
    noise = noise or (lambda step: torch.randn_like(x))

    times = sde_times(steps, diffusion, last_step, last_step_size).to(dtype)
    on_device = times.to(x.device)
    state = x.to(dtype)
    for i, t_start in enumerate(times[:-1].tolist()):
        t, h = on_device[i], on_device[i] - on_device[i + 1]
        v = at_step(velocity, t_start)(state.to(x.dtype), t).to(dtype)
        if i == steps - 1 and last_step == "tweedie":
            state = interpolant.data_from_velocity(state, v, t)
            break
        if i == steps - 1 and last_step == "euler":
            state = state - h * v
            break
        D = diffusion_scale * DIFFUSIONS[diffusion](interpolant, t)
        state = state - h * (v - D * interpolant.score_from_velocity(state, v, t))
        if i < steps - 1 or last_step == "none":
            state = state + (2 * D * h).sqrt() * noise(i).to(state)
    return state.to(x.dtype)
