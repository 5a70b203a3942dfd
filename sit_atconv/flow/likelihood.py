"""Likelihood of data under the flow of the ODE, by the instantaneous change of variables (Chen et al. 2018)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.flow.field import Velocity, at_step, per_sample, switch_times
from sit_atconv.flow.ode import integrate_ode, solver_dtype


@dataclass(frozen=True)
class VelocityAndTrace:
    """The field of states (B, 2, ...): x, and for each element of x its share of the integrated divergence.

    Hutchinson's estimate of the divergence, eᵀ(∂v/∂x)e, is a sum over elements. Integrating its terms instead of the
    sum gives the divergence the same weight as x in the error norm of dopri5, whatever the number of elements.
    """

    velocity: Velocity
    probe: Tensor = field(compare=False)
    network_dtype: torch.dtype

    def __call__(self, state: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = state[:, 0].to(self.network_dtype, copy=True).requires_grad_()
            v = self.velocity(x, t.clone()).to(state.dtype)
            pulled_back = torch.zeros_like(x)
            if v.requires_grad:  # else the field does not depend on x
                options = {"allow_unused": True, "materialize_grads": True}
                (pulled_back,) = torch.autograd.grad(v, x, self.probe.to(v.dtype), **options)
        return torch.stack([v.detach(), self.probe * pulled_back.to(state.dtype)], dim=1)

    def at_step(self, t: float) -> "VelocityAndTrace":
        """See `field.at_step`."""
        return replace(self, velocity=at_step(self.velocity, t))

    @property
    def switch_times(self) -> tuple[float, ...]:
        """See `field.switch_times`."""
        return switch_times(self.velocity)


def bits_per_dimension(
    velocity: Callable[..., Tensor],
    x: Tensor,
    steps: int = 50,
    method: str = "heun",
    *,
    probe: Tensor | None = None,
    start: float = 0.0,
    end: float = 1.0,
    **options: Any,
) -> Tensor:
    """−log₂ p(x) / D for each sample, in bits per dimension (B,): lower is more likely.

    log p(x) = log N(x₁; 0, I) + ∫ div v dt along the ODE from x to the noise x₁ (Song et al. 2021, arXiv 2011.13456,
    §D.2). div v = E[eᵀ(∂v/∂x)e], with one vector e of random signs for a sample's whole trajectory (Grathwohl et al.
    2019). The estimate of log p(x) is unbiased, and exact where ∂v/∂x is diagonal. One evaluation costs a forward and a
    backward pass.

    These are bits of the density of x on the scale on which it is given. For a latent z = (posterior sample − shift)·s,
    add −log₂ s for the density of the posterior sample. For pixels in [−1, 1] made from 8-bit ones plus uniform noise
    of one grey level (dequantisation), add log₂ 127.5 ≈ 6.994 for an upper bound on the bits of the 8-bit image. Bits
    of latents say nothing about pixels: the autoencoder's own term is missing.

    Args:
        velocity: as for `integrate_ode`, without guidance: a guided field does not describe a learnt density. Its
            tensors, such as labels, must not have been made under `torch.inference_mode`.
        x: data, (B, ...).
        steps, method, options: see `integrate_ode`, whose errors are raised as well. N steps of heun cost 2N
            evaluations.
        probe: e, of x's shape, ±1 with equal probability; drawn from torch's global generator when not given.
        start, end: exclude singular ends as for `integrate_ode`; the density is then that of x_t at `start`.

    Raises:
        InputError: for a probe of another shape, and as `integrate_ode` does.
    """
    if probe is None:
        probe = torch.randint(0, 2, x.shape, device=x.device) * 2 - 1
    if probe.shape != x.shape:
        raise InputError(f"The probe must have the shape of x, {tuple(x.shape)}, not {tuple(probe.shape)}.")
    dtype = options.setdefault("dtype", solver_dtype(x.device))
    field = VelocityAndTrace(velocity, probe.to(x.device, dtype), x.dtype)
    state = torch.stack([x.to(dtype), torch.zeros_like(x, dtype=dtype)], dim=1)
    final = integrate_ode(field, state, steps, method, start=start, end=end, **options)
    noise, divergence = per_sample(final[:, 0]), per_sample(final[:, 1])
    log_p = (divergence - noise**2 / 2 - math.log(2 * math.pi) / 2).mean(1)
    return -log_p / math.log(2)
