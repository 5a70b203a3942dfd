"""Deterministic solvers of the probability-flow ODE dx/dt = v(x, t), by default from noise (t = 1) to data (t = 0)."""

import torch
from torch import Tensor
from torchdiffeq import odeint

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.flow.guidance import Velocity, at_step
from sit_atconv.flow.losses import shift_times

FIXED_STEP_METHODS = ("euler", "heun", "midpoint")
ODE_METHODS = (*FIXED_STEP_METHODS, "dopri5")


def solver_dtype(device: torch.device) -> torch.dtype:
    """fp64 for time grids and states, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def require_steps(steps: int) -> None:
    if steps < 1:
        raise InputError(f"A solver needs at least one step, not {steps}.")


def integrate_ode(
    velocity: Velocity,
    x: Tensor,
    steps: int = 50,
    method: str = "heun",
    *,
    start: float = 1.0,
    end: float = 0.0,
    shift: float = 1.0,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Solve the ODE from time `start` to `end`; returns the state there, of x's shape and dtype.

    Args:
        velocity: callable of (x, t) with t a scalar tensor; x arrives in its own dtype.
        x: the state at `start`, (B, ...).
        steps: N intervals, on linspace(start, end, N+1) after `shift`. dopri5 chooses its own.
        method: "euler" (N evaluations), "heun" (2N−1: the last step is Euler's, so that v at t = 0 is not needed),
            "midpoint" (2N) or "dopri5" (adaptive, `atol` and `rtol` are SiT's).
        shift: see `shift_times`.
        dtype: of state and time grid; fp64 where the device has it.

    Raises:
        InputError: for an unknown method or steps < 1.
    """
    require_one_of(method, ODE_METHODS, "ODE solver")
    require_steps(steps)
    dtype = dtype or solver_dtype(x.device)
    state = x.to(dtype)
    if method == "dopri5":
        ends = torch.tensor([start, end], dtype=dtype, device=x.device)

        def field(t: Tensor, state: Tensor) -> Tensor:
            return velocity(state.to(x.dtype), t).to(dtype)

        return odeint(field, state, ends, method="dopri5", atol=atol, rtol=rtol)[-1].to(x.dtype)

    times = shift_times(torch.linspace(start, end, steps + 1, dtype=torch.float64), shift).to(dtype)
    on_device = times.to(x.device)
    for i, t in enumerate(times[:-1].tolist()):
        step_velocity = at_step(velocity, t)

        def field(state: Tensor, t: Tensor, step_velocity: Velocity = step_velocity) -> Tensor:
            return step_velocity(state.to(x.dtype), t).to(dtype)

        state = _step(field, state, on_device[i], on_device[i + 1], method, last=i == steps - 1)
    return state.to(x.dtype)


def _step(field: Velocity, x: Tensor, t: Tensor, t_next: Tensor, method: str, last: bool) -> Tensor:
    h = t_next - t
    v = field(x, t)
    if method == "midpoint":
        return x + h * field(x + h / 2 * v, t + h / 2)
    if method == "heun" and not last:
        return x + h / 2 * (v + field(x + h * v, t_next))
    return x + h * v
