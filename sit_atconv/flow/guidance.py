"""Classifier-free guidance (Ho & Salimans 2022) within an interval of times (Kynkäänniemi et al. 2024)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sit_atconv.errors import InputError

Velocity = Callable[[Tensor, Tensor], Tensor]


def at_step(velocity: Velocity, t: float) -> Velocity:
    """The field for all stages of a solver step that starts at time t: guidance decides once a step, as in REPA."""
    return velocity.at_step(t) if hasattr(velocity, "at_step") else velocity


@dataclass(frozen=True)
class GuidedVelocity:
    """See `guided_velocity`."""

    model: Callable[[Tensor, Tensor, Tensor], Tensor]
    labels: Tensor
    null_label: int
    scale: float
    interval: tuple[float, float]
    channels: int | None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.at_step(float(t))(x, t)

    def at_step(self, t: float) -> Velocity:
        low, high = self.interval
        return self._guided if low <= t <= high else self._conditional

    def _conditional(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t, self.labels)

    def _guided(self, x: Tensor, t: Tensor) -> Tensor:
        # Both halves are one batch: labels differ, noise does not.
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.null_label)])
        conditional, unconditional = self.model(torch.cat([x, x]), t, labels).chunk(2)
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], conditional[:, self.channels :]], dim=1)


def guided_velocity(
    model: Callable[..., Tensor],
    labels: Tensor | None,
    scale: float = 1.0,
    *,
    null_label: int | None,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """The field v = v_null + s·(v_cond − v_null) as a callable of (x, t), t a scalar.

    Outside `interval` (low <= t <= high, at the start of a solver's step) the conditional velocity alone is computed.

    Args:
        model: callable of (x, t, y), or of (x, t) when `labels` is None.
        labels: (B,) int64, or None for an unconditional model.
        scale: s; 1 means no guidance and runs no second half.
        null_label: the class that stands for no label; None when the model has none.
        channels: guide only the first so many channels (3 reproduces the original DiT and SiT); None guides all.

    Raises:
        InputError: for guidance without a null class, or an interval outside 0 <= low <= high <= 1.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise InputError(f"The guidance interval must satisfy 0 <= low <= high <= 1, not {low} {high}.")
    if scale == 1:
        return model if labels is None else lambda x, t: model(x, t, labels)
    if labels is None or null_label is None:
        raise InputError(
            f"Guidance {scale} needs a model with classes and a null class; this one is unconditional: use guidance 1."
        )
    return GuidedVelocity(model, labels, null_label, scale, (low, high), channels)
