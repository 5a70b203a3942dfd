"""Training objectives: flow matching (SiT, arXiv 2401.08740) and alignment to a teacher (REPA, arXiv 2410.06940)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.flow.field import match_dims, per_sample
from sit_atconv.flow.interpolants import PREDICTIONS, Cosine, Interpolant, Linear

WEIGHTINGS = ("none", "velocity", "likelihood")
SHORTEST = 1e-2  # of a velocity; those of normalised latents are about √(2C) long


def flow_matching_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    interpolant: Interpolant | None = None,
    prediction: str = "velocity",
    weighting: str = "none",
) -> Tensor:
    """Mean squared error of the prediction for each sample, computed in fp32: (B,).

    The errors are ‖v̂ − v‖² for the velocity, ‖ε̂ − ε‖² for noise, ‖σŝ + ε‖² for the score (denoising score matching,
    in units of noise) and ‖x̂ − x‖² for data, each averaged over the elements (SiT, §2.2 and §3.2).

    Args:
        network: a callable of (x_t, t) that predicts one of `PREDICTIONS`.
        x, noise: data and standard normal noise, (B, ...).
        t: times within `interpolant.time_range(prediction)`, (B,).
        interpolant: `Linear()` when not given.
        weighting: of noise and score errors, where g is the drift variance: "none"; "velocity", (g/σ)², which gives the
            loss of the implied velocity; or "likelihood", g/σ², which weights the score's error by g, as in maximum
            likelihood (Song et al. 2021).

    Raises:
        InputError: for unknown names, or a weighting with a velocity or data prediction.
    """
    interpolant = interpolant or Linear()
    require_loss(prediction, weighting)
    predicted = network(interpolant.interpolate(x, noise, t), t)
    wide = torch.promote_types(x.dtype, torch.float32)
    error = _error(predicted.to(wide), prediction, x.to(wide), noise.to(wide), t, interpolant)
    loss = per_sample(error).square().mean(1)
    if weighting == "none":
        return loss
    g, sigma = interpolant.drift_variance(t), interpolant.sigma(t)
    return loss * ((g / sigma) ** 2 if weighting == "velocity" else g / sigma**2)


def require_loss(prediction: str, weighting: str) -> None:
    """Raise `InputError` unless this prediction and this weighting go together."""
    require_one_of(prediction, PREDICTIONS, "prediction")
    require_one_of(weighting, WEIGHTINGS, "weighting")
    if weighting != "none" and prediction not in ("noise", "score"):
        raise InputError(
            f"The weighting '{weighting}' is defined for predictions of noise and score, not of {prediction}: use none."
        )


def _error(predicted: Tensor, prediction: str, x: Tensor, noise: Tensor, t: Tensor, interpolant: Interpolant) -> Tensor:
    if prediction == "velocity":
        return predicted - interpolant.velocity(x, noise, t)
    if prediction == "noise":
        return predicted - noise
    if prediction == "score":
        return interpolant.sigma(match_dims(t, x)) * predicted + noise
    return predicted - x


def direction_loss(
    velocity: Tensor, x: Tensor, noise: Tensor, t: Tensor, interpolant: Interpolant | None = None
) -> Tensor:
    """1 − cos(v̂, v) over the channels of each position, averaged over positions, in fp32: (B, C, ...) -> (B,).

    LightningDiT's second term (arXiv 2501.01423, "velocity direction loss"). A prediction shorter than `SHORTEST`
    counts as that long: the slope of the cosine is 1/length, and an untrained SiT predicts 0. Without a shortest
    length, the first gradients would stay in Adam's second moments for thousands of steps.
    """
    interpolant = interpolant or Linear()
    wide = torch.promote_types(x.dtype, torch.float32)
    target = interpolant.velocity(x.to(wide), noise.to(wide), t)
    cosine = F.cosine_similarity(velocity.to(wide), target, dim=1, eps=SHORTEST)
    return per_sample(1 - cosine).mean(1)


def require_direction(prediction: str, channels: int) -> None:
    """Raise `InputError` unless `direction_loss` is defined and can teach: for velocities of two channels or more."""
    if prediction != "velocity":
        raise InputError(
            f"The cosine term compares directions of velocities, and the network predicts {prediction}: set "
            "flow.cosine to 0, or flow.prediction to velocity."
        )
    if channels < 2:
        raise InputError(
            "The cosine term compares directions over the channels of a position, and these data have only one, whose "
            "cosine is a sign and has no slope: set flow.cosine to 0."
        )


def alignment_loss(projected: Tensor, teacher_tokens: Tensor) -> Tensor:
    """−cos(projected, teacher) averaged over the tokens of each sample (REPA, Eq. 8): (B, N, D) twice -> (B,).

    Both sides are normalised in fp32, since half precision has caused NaNs.
    """
    return -F.cosine_similarity(projected.float(), teacher_tokens.float(), dim=-1).mean(1)


def times_from_uniform(
    u: Tensor,
    distribution: str = "uniform",
    interpolant: Interpolant | None = None,
    shift: float = 1.0,
    prediction: str = "velocity",
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Training times from uniform numbers u in [0, 1), by the inverse cumulative distribution function.

    Args:
        distribution: "uniform", or "logit-normal": with σ = exp(mean + std · normal), t = σ/(1+σ) for the linear
            interpolant and (2/π)·atan(σ) for the cosine one.
        shift: t ← s·t / (1 + (s−1)·t): s > 1 moves times towards noise, 1 leaves them unchanged.
        prediction: what the network predicts: [0, 1] is mapped onto `interpolant.time_range(prediction)`.
        mean, std: of logit-normal times. A mean < 0 moves them towards data; for the linear interpolant, a shift s is
            the same as adding ln s to the mean.

    Raises:
        InputError: for an unknown distribution, a shift <= 0, logit-normal times with another interpolant, or a mean or
            std that is not for this distribution.
    """
    interpolant = interpolant or Linear()
    require_times(distribution, interpolant, mean, std)
    if distribution == "uniform":
        t = u
    elif isinstance(interpolant, Linear):
        t = torch.sigmoid(mean + std * torch.special.ndtri(u))
    else:
        t = torch.atan((mean + std * torch.special.ndtri(u)).exp()) * 2 / torch.pi
    low, high = interpolant.time_range(prediction)
    return low + (high - low) * shift_times(t, shift)


def require_times(distribution: str, interpolant: Interpolant, mean: float = 0.0, std: float = 1.0) -> None:
    """Raise `InputError` unless this time distribution is defined for this interpolant, with this mean and std."""
    require_one_of(distribution, ("uniform", "logit-normal"), "time distribution")
    if distribution == "logit-normal" and not isinstance(interpolant, Linear | Cosine):
        raise InputError("Logit-normal times are defined for the linear and cosine interpolants: use uniform ones.")
    if distribution == "uniform" and (mean, std) != (0, 1):
        raise InputError(
            f"times_mean = {mean:g} and times_std = {std:g} are those of logit-normal times, and times are uniform: "
            "set flow.times to logit-normal, or leave them at 0 and 1."
        )
    if std <= 0:
        raise InputError(f"The standard deviation of logit-normal times must be positive, not {std:g}.")


def shift_times(t: Tensor, shift: float) -> Tensor:
    """t ← s·t / (1 + (s−1)·t) (Esser et al. 2024, Eq. 23): 0 and 1 stay fixed, s > 1 moves times towards noise."""
    if shift <= 0:
        raise InputError(f"The timestep shift must be positive, not {shift}; 1 leaves times as they are.")
    return shift * t / (1 + (shift - 1) * t)


def drop_labels(labels: Tensor, u: Tensor, probability: float, null_label: int) -> Tensor:
    """Replace a share of labels (B,) by the null label, for classifier-free guidance; u (B,) uniform in [0, 1)."""
    return torch.where(u.to(labels.device) < probability, null_label, labels)
