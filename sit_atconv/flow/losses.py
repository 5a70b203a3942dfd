"""Training objectives: flow matching (SiT, arXiv 2401.08740) and alignment to a teacher (REPA, arXiv 2410.06940)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.flow.interpolants import Cosine, Interpolant, Linear


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    interpolant: Interpolant | None = None,
) -> Tensor:
    """Mean squared error of the predicted velocity for each sample, compared in fp32: (B,).

    Args:
        velocity: the network, a callable of (x_t, t).
        x, noise: data and standard normal noise, (B, ...).
        t: times in [0, 1], (B,).
        interpolant: `Linear()` when not given.
    """
    interpolant = interpolant or Linear()
    predicted = velocity(interpolant.interpolate(x, noise, t), t)
    target = interpolant.velocity(x, noise, t)
    wide = torch.promote_types(target.dtype, torch.float32)
    return (predicted.to(wide) - target.to(wide)).square().flatten(1).mean(1)


def alignment_loss(projected: Tensor, teacher_tokens: Tensor) -> Tensor:
    """−cos(projected, teacher) averaged over the tokens of each sample (REPA, Eq. 8): (B, N, D) twice -> (B,).

    Both sides are normalised in fp32: half precision has been the cause of NaNs.
    """
    return -F.cosine_similarity(projected.float(), teacher_tokens.float(), dim=-1).mean(1)


def times_from_uniform(
    u: Tensor, distribution: str = "uniform", interpolant: Interpolant | None = None, shift: float = 1.0
) -> Tensor:
    """Training times from uniform numbers u in [0, 1), by inverting the distribution's cumulative function.

    Args:
        distribution: "uniform", or "logit-normal": with σ = exp(normal), t = σ/(1+σ) for the linear interpolant and
            (2/π)·atan(σ) for the cosine one.
        shift: s > 0 moves times towards noise, t ← s·t / (1 + (s−1)·t); 1 leaves them.

    Raises:
        InputError: for an unknown distribution, a shift <= 0, or logit-normal times with another interpolant.
    """
    interpolant = interpolant or Linear()
    require_one_of(distribution, ("uniform", "logit-normal"), "time distribution")
    if distribution == "uniform":
        t = u
    elif isinstance(interpolant, Linear):
        t = torch.sigmoid(torch.special.ndtri(u))
    elif isinstance(interpolant, Cosine):
        t = torch.atan(torch.special.ndtri(u).exp()) * 2 / torch.pi
    else:
        raise InputError("Logit-normal times are defined for the linear and cosine interpolants: use uniform ones.")
    return interpolant.t_min + (1 - interpolant.t_min) * shift_times(t, shift)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """t ← s·t / (1 + (s−1)·t) (Esser et al. 2024, Eq. 23): 0 and 1 stay, s > 1 spends more time near noise."""
    if shift <= 0:
        raise InputError(f"The timestep shift must be positive, not {shift}; 1 leaves times as they are.")
    return shift * t / (1 + (shift - 1) * t)


def drop_labels(labels: Tensor, u: Tensor, probability: float, null_label: int) -> Tensor:
    """Replace a share of labels (B,) by the null label, for classifier-free guidance; u (B,) uniform in [0, 1)."""
    return torch.where(u.to(labels.device) < probability, null_label, labels)
