"""What the solvers integrate: a velocity field, which may be piecewise in time."""

from collections.abc import Callable

import torch
from torch import Tensor

# (x, t) -> velocity of x's shape. t is a scalar tensor on the CPU whatever x's device is, so that reading it never
# waits for the device; or (B,) on x's device where every sample has its own time (dopri5).
Velocity = Callable[..., Tensor]
# (step, t, state) -> the state to continue with; steps are counted from 0, t and state are those after the step
OnStep = Callable[[int, float, Tensor], Tensor]


def at_step(velocity: Velocity, t: float) -> Velocity:
    """The field for all stages of a solver step that starts at time t: guidance is decided once per step, as in REPA.

    A field that changes its form with time has a method `at_step(t)`. t is a Python float, so that the decision never
    waits for the device. What it returns at two times must be equal (==) where the form is the same: multistep solvers
    compare, and begin anew where it is not.
    """
    return velocity.at_step(t) if hasattr(velocity, "at_step") else velocity


def switch_times(velocity: Velocity) -> tuple[float, ...]:
    """Times at which the field changes its form (its attribute `switch_times`); an adaptive solver stops there."""
    return getattr(velocity, "switch_times", ())


def widened(velocity: Velocity, network_dtype: torch.dtype, dtype: torch.dtype) -> Velocity:
    """Wrap a field so that states are in `dtype` while the network computes in `network_dtype`."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        return velocity(x.to(network_dtype), t).to(dtype)

    return field


def per_sample(x: Tensor) -> Tensor:
    """(B, ...) reshaped to (B, D)."""
    return x.reshape(len(x), x[:1].numel() if len(x) else 0)


def match_dims(t: Tensor, x: Tensor) -> Tensor:
    """Times t, a scalar or (B,), shaped to broadcast against x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t
