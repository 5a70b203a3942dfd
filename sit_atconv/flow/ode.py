"""Deterministic solvers of the probability-flow ODE dx/dt = v(x, t), by default from noise (t = 1) to data (t = 0)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.flow.adams import ADAMS_ORDERS, Adams
from sit_atconv.flow.adaptive import integrate_adaptive
from sit_atconv.flow.field import OnStep, Velocity, at_step, widened
from sit_atconv.flow.finite import FiniteGuard
from sit_atconv.flow.losses import shift_times

FIXED_STEP_METHODS = ("euler", "heun", "midpoint", *ADAMS_ORDERS)
ODE_METHODS = (*FIXED_STEP_METHODS, "dopri5")
MOST_STEPS = 100_000


def solver_dtype(device: torch.device) -> torch.dtype:
    """The dtype of time grids and states: fp64 where the device supports it."""
    return torch.float32 if device.type == "mps" else torch.float64


def require_steps(steps: int) -> None:
    """Raise `InputError` unless steps is from 1 to `MOST_STEPS`."""
    if steps < 1:
        raise InputError(f"A solver needs at least one step, not {steps}.")
    if steps > MOST_STEPS:
        raise InputError(f"A solver takes {MOST_STEPS:,} steps at most, and some hundreds do: not {steps:,}.")


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
    samples: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Solve the ODE from time `start` to `end`; returns the state there, of x's shape and dtype.

    With the VP interpolant, or a network that does not predict the velocity, the field is singular at ends of [0, 1]:
    start and end within `interpolant.time_range(prediction)`. At t = 1e-3 the data keep 0.1 % of noise.

    Args:
        velocity: callable of (x, t), where t is a scalar tensor on the CPU, or (B,) on x's device for dopri5.
        x: the state at `start`, (B, ...).
        steps: N intervals, see `ode_times`. dopri5 chooses its own.
        method: "euler" (N evaluations); "heun" (2N towards noise, 2N−1 towards data, where the last step is an Euler
            step since the velocity may not exist at t = 0 and its error is largest near it); "midpoint" (2N);
            "adams2" (N+1) or "adams4" (N+4), and 1 or 4 more wherever guidance begins or ends, see `Adams`; or
            "dopri5", which chooses steps for each sample separately, see `integrate_adaptive`.
        shift: see `shift_times`.
        atol, rtol: of dopri5; the defaults are SiT's.
        dtype: of state and time grid; fp64 where the device supports it.
        samples: numbers of the samples, for the message of `NonFiniteError`.
        on_step: called after every step, may change the state; not with dopri5, where each sample has its own steps.

    Raises:
        InputError: for an unknown method, steps < 1, on_step with dopri5, or times that are equal or not in [0, 1].
        NonFiniteError: when states become NaN or infinite.
    """
    require_one_of(method, ODE_METHODS, "ODE solver")
    require_steps(steps)
    if start == end or not (0 <= start <= 1 and 0 <= end <= 1):
        raise InputError(f"A solver needs two different times in [0, 1], not {start} and {end}.")
    dtype = dtype or solver_dtype(x.device)
    if method == "dopri5":
        if on_step is not None:
            raise InputError("dopri5 has separate steps for each sample and takes no on_step: choose another solver.")
        return integrate_adaptive(velocity, x, start, end, atol=atol, rtol=rtol, dtype=dtype, samples=samples).to(x)

    times = ode_times(steps, start, end, shift)
    return _integrate_steps(velocity, x, times, method, dtype, FiniteGuard(x, samples), on_step).to(x)


def ode_times(steps: int, start: float, end: float, shift: float) -> Tensor:
    """The grid of N intervals: N+1 times from `start` to `end`, evenly spaced before the shift; fp64 on the CPU."""
    low, high = sorted((start, end))
    evenly = torch.linspace(float(start > end), float(start < end), steps + 1, dtype=torch.float64)
    return low + (high - low) * shift_times(evenly, shift)


def invert(
    velocity: Velocity,
    x: Tensor,
    steps: int = 50,
    method: str = "heun",
    *,
    start: float = 0.0,
    end: float = 1.0,
    **options: Any,
) -> Tensor:
    """The noise that the ODE maps to data x: `integrate_ode` in reverse, with its options.

    Sampling on the same grid returns x up to the solver's error. Where t = 0 or t = 1 is singular, let start and end be
    `interpolant.time_range(prediction)`.
    """
    return integrate_ode(velocity, x, steps, method, start=start, end=end, **options)


def _integrate_steps(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    method: str,
    dtype: torch.dtype,
    guard: FiniteGuard,
    on_step: OnStep | None,
) -> Tensor:
    state, starts = x.to(dtype), times[:-1].tolist()
    on_host = times.to(dtype)  # arithmetic with CPU scalars does not wait for the device
    towards_data = times[-1] < times[0]
    adams = Adams(ADAMS_ORDERS[method]) if method in ADAMS_ORDERS else None
    for i, t in enumerate(starts):
        form = at_step(velocity, t)
        field = widened(form, x.dtype, dtype)
        if adams is not None:
            state = adams.step(form, field, state, on_host[i], on_host[i + 1])
        else:
            only_euler = method == "heun" and towards_data and i == len(starts) - 1
            state = _step(field, state, on_host[i], on_host[i + 1], "euler" if only_euler else method)
        guard.watch(i, state)
        if on_step is not None:
            state = on_step(i, times[i + 1].item(), state)
    guard.check(starts)
    return state


def _step(field: Velocity, x: Tensor, t: Tensor, t_next: Tensor, method: str) -> Tensor:
    h = t_next - t
    v = field(x, t)
    if method == "midpoint":
        return x + h * field(x + h / 2 * v, t + h / 2)
    if method == "heun":
        return x + h / 2 * (v + field(x + h * v, t_next))
    return x + h * v
