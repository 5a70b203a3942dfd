"""The Dormand-Prince pair of orders 5 and 4, with a separate step size for each sample.

In torchdiffeq one error norm over the whole batch chooses one step for all samples, so that a sample depends on the
rest of its batch. Here every sample has its own error norm, step size and time: its result depends only on its own
start, up to rounding of the network in other batches. torchode (Lienen & Günnemann 2022) does the same, but requires a
typeguard of 2021 that conflicts with most environments. For a batch of one, steps are chosen as in torchdiffeq with
`ifactor=5`, with which the tests compare this solver; only the last step differs: it ends at the end time instead of
beyond it.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sit_atconv.flow.field import Velocity, at_step, match_dims, per_sample, switch_times, widened
from sit_atconv.flow.finite import NonFiniteError

Field = Callable[[Tensor, Tensor], Tensor]

# Nodes and weights of Dormand & Prince (1980). The last row of A also gives the solution of order 5, whose slope is the
# first one of the next step. E is the difference from the solution of order 4, in the version of Shampine (1986).
_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (71 / 86400, 0.0, -142 / 50085, 71 / 2880, -5751 / 169600, 44 / 1575, -1 / 60)


def integrate_adaptive(
    velocity: Velocity,
    x: Tensor,
    start: float,
    end: float,
    *,
    atol: float,
    rtol: float,
    dtype: torch.dtype,
    samples: Sequence[int] | None = None,
) -> Tensor:
    """Solve dx/dt = v(x, t) from `start` to `end` for each sample independently; returns the states at `end`.

    A field that switches, such as one guided within an interval, is integrated piece by piece: no step crosses a jump.
    In each piece two evaluations choose the first steps, and every attempted step takes six. All samples are evaluated
    together until the last one has finished. The host waits for the device once per attempt, to check whether any
    sample is unfinished.

    Args:
        velocity: callable of (x, t) with t (B,) in `dtype`; x keeps its own dtype.
        x: the states at `start`, (B, ...).
        atol, rtol: a step is accepted when the root mean square of error / (atol + rtol·max(|x|, |x_next|)) is <= 1.
        dtype: of the integration and of the returned states.
        samples: see `FiniteGuard`.

    Raises:
        NonFiniteError: for samples whose field is not finite, or so rough that the step size vanishes.
    """
    state = x.to(dtype)
    between = [t for t in switch_times(velocity) if min(start, end) < t < max(start, end)]
    for first, last in pairwise([start, *sorted(set(between), reverse=start > end), end]):
        field = widened(at_step(velocity, (first + last) / 2), x.dtype, dtype)
        state = _integrate_piece(field, state, first, last, atol, rtol, samples)
    return state


def _integrate_piece(
    field: Field, x: Tensor, start: float, end: float, atol: float, rtol: float, samples: Sequence[int] | None
) -> Tensor:
    direction = 1.0 if end > start else -1.0
    smallest = 16 * torch.finfo(x.dtype).eps  # a shorter step would not change t
    t = torch.full((len(x),), start, dtype=x.dtype, device=x.device)
    slope = field(x, t)
    h = _first_step(field, x, slope, t, direction, abs(end - start), atol, rtol)
    failed = ~per_sample(x + slope).isfinite().all(1)
    attempts = 1
    while True:
        # Unfinished samples; each sample's last step ends exactly at the end time
        remaining = (end - t).abs()
        failed = failed | ~((h >= smallest) | (h >= remaining))  # a step size that is NaN fails as well
        under_way = (remaining > 0) & ~failed
        if not under_way.any():
            break
        h = torch.where(under_way, torch.minimum(h, remaining), 0.0)
        t_next = torch.where(h < remaining, t + direction * h, end)

        # One step with each sample's own size, accepted or rejected
        x_next, slope_next, error = _step(field, x, slope, t, t_next)
        ratio = _norm(error / (atol + rtol * torch.maximum(x.abs(), x_next.abs())))
        accepted = under_way & (ratio <= 1)
        moved = match_dims(accepted, x)
        x, slope = torch.where(moved, x_next, x), torch.where(moved, slope_next, slope)
        t = torch.where(accepted, t_next, t)
        h = h * _step_factor(ratio)
        attempts += 1
    _require_arrival(failed, t, attempts, samples)
    return x


def _step(field: Field, x: Tensor, slope: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state and slope at t_next, and the estimated error of the state."""
    step, slopes = match_dims(t_next - t, x), [slope]
    for c, row in zip(_C, _A, strict=True):
        x_next = x + step * _combine(row, slopes)
        slopes.append(field(x_next, torch.lerp(t, t_next, c)))
    return x_next, slopes[-1], step * _combine(_E, slopes)


def _combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)


def _norm(x: Tensor) -> Tensor:
    """Root mean square over each sample's elements: (B,)."""
    return per_sample(x).square().mean(1).sqrt()


def _step_factor(ratio: Tensor) -> Tensor:
    """Factor by which each step size changes, from its ratio of error to tolerance: 0.2 to 5, at least 1 if accepted.

    Hairer, Nørsett & Wanner recommend at most 5. With torchdiffeq's 10, the second step size depends on the error of
    the first step, which is so short that its error is mostly rounding of the network: the same sample in another batch
    would then differ by more than the tolerance.
    """
    factor = 0.9 * ratio.nan_to_num(nan=torch.inf) ** -0.2
    return torch.where(ratio < 1, factor.clamp(1, 5), factor.clamp(0.2, 5))


def _first_step(
    field: Field, x: Tensor, slope: Tensor, t: Tensor, direction: float, span: float, atol: float, rtol: float
) -> Tensor:
    """Sizes (B,) of the first steps, from the slope and how fast it changes (Hairer, Nørsett & Wanner I, §II.4)."""
    scale = atol + rtol * x.abs()
    d0, d1 = _norm(x / scale), _norm(slope / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=span)
    ahead = field(x + direction * match_dims(h0, x) * slope, t + direction * h0)
    d2 = _norm((ahead - slope) / scale) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    return torch.where(steepest.isfinite(), torch.minimum(100 * h0, h1), h0)


def _require_arrival(failed: Tensor, t: Tensor, attempts: int, samples: Sequence[int] | None) -> None:
    rows = [row for row, bad in enumerate(failed.tolist()) if bad]
    if rows:
        raise NonFiniteError(attempts, t[rows[0]].item(), rows, samples)
