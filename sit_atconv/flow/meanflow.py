"""Average velocities, for sampling in few steps: MeanFlow (arXiv 2505.13447), Decoupled MeanFlow (arXiv 2510.24474).

u(x_t, t, r) is the average velocity of the ODE from time t, near noise, to r <= t, near data: x_r = x_t − (t − r) u.
Differentiating (t − r) u by t along the path gives the MeanFlow identity, u = v − (t − r) du/dt, which trains it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sit_atconv.flow.field import OnStep, match_dims, per_sample
from sit_atconv.flow.finite import FiniteGuard
from sit_atconv.flow.losses import shift_times
from sit_atconv.flow.ode import ode_times, require_steps, solver_dtype

AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t, r) -> u of x's shape

# Means of the two logit-normal distributions of times, of standard deviation 1 (§5 of Decoupled MeanFlow)
LATER, EARLIER = 0.4, -1.2


def times_from_normal(normal: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """Times t >= r, (B,) each, from standard normal numbers (B, 2): the larger and the smaller of two logit-normals."""
    pair = torch.sigmoid(normal + normal.new_tensor([LATER, EARLIER]))
    return shift_times(pair.amax(1), shift), shift_times(pair.amin(1), shift)


def contained_guidance(velocity: Tensor, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """ṽ = v + (1 − 1/s)(u_c − u_∅): a network that is trained on ṽ contains guidance of scale s.

    Its mean solves u_c = v + (1 − 1/s)(u_c − u_∅), which is u_c = u_∅ + s (v − u_∅). All are (B, ...); s >= 1.
    """
    return velocity + (1 - 1 / scale) * (conditional - unconditional)


def derivative_along_path(
    network: AverageVelocity, x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor
) -> tuple[Tensor, Tensor]:
    """u(x_t, t, r) and its total derivative du/dt = ∂u/∂x·v + ∂u/∂t where x moves with `velocity`, in one pass.

    Args:
        network: has forward-mode derivatives. What it returns should be fp32: a derivative has the dtype of its value.
        x_t, velocity: (B, ...).
        t, r: (B,).

    Returns:
        u, through which gradients flow, and du/dt without gradients, of x_t's shape.
    """
    u, derivative = torch.func.jvp(lambda x, t: network(x, t, r), (x_t, t), (velocity, torch.ones_like(t)))
    return u, derivative.detach()


def mean_flow_error(network: AverageVelocity, x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor) -> Tensor:
    """|u − sg(v − (t − r) du/dt)|², averaged over the elements of each sample: (B,). See `derivative_along_path`.

    It trains the average of the marginal velocity E[v | x_t], although each sample has its own v: du/dt is linear in v.
    """
    u, derivative = derivative_along_path(network, x_t, t, r, velocity)
    return squared_error(u, velocity - match_dims(t - r, x_t) * derivative)


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """|predicted − target|², averaged over the elements of each sample: (B, ...) twice -> (B,)."""
    return per_sample(predicted - target).square().mean(1)


def integrate_average(
    network: AverageVelocity,
    x: Tensor,
    steps: int = 1,
    *,
    shift: float = 1.0,
    dtype: torch.dtype | None = None,
    samples: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """From noise x (B, ...) at t = 1 to data in N steps x_r = x_t − (t − r) u(x_t, t, r), with N calls of the network.

    With the exact u every N gives the ODE's own solution.

    Args:
        network: callable of (x, t, r), where t and r are scalar tensors on the CPU.
        steps: N intervals, see `ode_times`.
        shift, dtype, samples, on_step: as of `integrate_ode`.

    Raises:
        InputError: for steps < 1.
        NonFiniteError: when states become NaN or infinite.
    """
    require_steps(steps)
    dtype = dtype or solver_dtype(x.device)
    times, guard, state = ode_times(steps, 1.0, 0.0, shift), FiniteGuard(x, samples), x.to(dtype)
    on_host = times.to(dtype)  # arithmetic with CPU scalars does not wait for the device
    for i in range(steps):
        t, r = on_host[i], on_host[i + 1]
        state = state - (t - r) * network(state.to(x.dtype), t, r).to(dtype)
        guard.watch(i, state)
        if on_step is not None:
            state = on_step(i, times[i + 1].item(), state)
    guard.check(times[:-1].tolist())
    return state.to(x)
