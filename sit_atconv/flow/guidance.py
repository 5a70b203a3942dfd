"""Guidance by the null class (Ho & Salimans 2022) or by a weaker model (Karras et al. 2024, arXiv 2406.02507).

And by a head of the model itself after one of its earlier blocks (Internal Guidance, Zhou et al. 2025, arXiv
2512.24176). Each may be limited to an interval of times (Kynkäänniemi et al. 2024, arXiv 2404.07724).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.flow.field import Velocity, at_step, switch_times


@dataclass(frozen=True)
class InternallyGuided:
    """v = v_internal + w·(v_model − v_internal) within an interval, v_model outside. See `internally_guided`."""

    pair: Callable[..., tuple[Tensor, Tensor]]
    alone: Velocity
    scale: float
    interval: tuple[float, float]

    def __call__(self, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        """The velocity at a scalar t; solvers call `at_step` instead, once per step."""
        return self.at_step(float(t))(x, t, *labels)

    def at_step(self, t: float) -> Velocity:
        """See `field.at_step`."""
        low, high = self.interval
        return self._guided if low <= t <= high else self.alone

    @property
    def switch_times(self) -> tuple[float, float]:
        """See `field.switch_times`."""
        return self.interval

    def _guided(self, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        model, internal = (prediction.to(x.dtype) for prediction in self.pair(x, t, *labels))
        return internal + self.scale * (model - internal)


def internally_guided(
    model: Callable[..., Tensor],
    pair: Callable[..., tuple[Tensor, Tensor]],
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """The field v_internal + w·(v − v_internal) of Internal Guidance (arXiv 2512.24176), a callable as `model` is.

    `guided_velocity` accepts it as its model: with the null class, both halves are then guided so.

    Args:
        model: callable of (x, t) or (x, t, labels), used alone outside `interval` (low <= t <= high, at the start of a
            solver step).
        pair: called like `model`, returns the model's prediction and that of its head in one call of the network.
        scale: w >= 0; 1 is `model` itself, whose head is then not computed.

    Raises:
        InputError: for a scale or an interval out of range.
    """
    require_guidance_ranges(scale, interval, "internal guidance")
    return model if scale == 1 else InternallyGuided(pair, model, scale, interval)


@dataclass(frozen=True)
class _Labelled:
    """A model's field for given labels, which may be none."""

    model: Callable[..., Tensor]
    labels: tuple[Tensor, ...]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t, *self.labels)

    def at_step(self, t: float) -> "_Labelled":
        """See `field.at_step`."""
        return replace(self, model=at_step(self.model, t))

    @property
    def switch_times(self) -> tuple[float, ...]:
        """See `field.switch_times`."""
        return switch_times(self.model)


@dataclass(frozen=True)
class GuidedVelocity:
    """v = v_base + s·(v_model − v_base) within an interval, v_model outside. See `guided_velocity`.

    `both` computes (v_model, v_base) within the interval from (model, x, t), `alone` computes v_model outside it.
    """

    both: Callable[[Callable[..., Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]
    alone: _Labelled
    scale: float
    interval: tuple[float, float]
    channels: int | None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at a scalar t; solvers call `at_step` instead, once per step."""
        return self.at_step(float(t))(x, t)

    def at_step(self, t: float) -> Velocity:
        """See `field.at_step`."""
        low, high = self.interval
        alone = self.alone.at_step(t)  # the model's own guidance has an interval of its own
        return _Guided(self, alone.model) if low <= t <= high else alone

    @property
    def switch_times(self) -> tuple[float, ...]:
        """See `field.switch_times`."""
        return (*self.interval, *self.alone.switch_times)

    def guide(self, network: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
        """The guided velocity, where `network` is the model in the form that its own guidance has at this step."""
        # In the state's precision: s times the difference of two half-precision numbers would be coarse.
        model, base = (prediction.to(x.dtype) for prediction in self.both(network, x, t))
        if base.shape != model.shape:
            raise InputError(f"The weak model predicts {tuple(base.shape)} where the model gives {tuple(model.shape)}.")
        if self.channels is None:
            return base + self.scale * (model - base)
        if self.channels > x.shape[1]:
            raise InputError(f"Guidance of {self.channels} channels was asked for; there are {x.shape[1]}.")
        guided = base[:, : self.channels] + self.scale * (model - base)[:, : self.channels]
        return torch.cat([guided, model[:, self.channels :]], dim=1)


@dataclass(frozen=True)
class _Guided:
    """A guided field within its interval; equal at all steps at which its model has the same form."""

    field: GuidedVelocity
    model: Callable[..., Tensor]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.field.guide(self.model, x, t)


def guided_velocity(
    model: Callable[..., Tensor],
    labels: Tensor | None,
    scale: float = 1.0,
    *,
    null_label: int | None,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    weak: Callable[..., Tensor] | None = None,
) -> Velocity:
    """The field v = v_null + s·(v_cond − v_null), or v_weak + s·(v − v_weak), as a callable of (x, t).

    Outside `interval` (low <= t <= high, at the start of a solver step) only the model is evaluated, without the null
    half or the weak model. The models may predict something other than the velocity: see `velocity_from_prediction`.

    Args:
        model: callable of (x, t, y), or of (x, t) when `labels` is None.
        labels: (B,) int64, or None for an unconditional model.
        scale: s >= 0; 1 means no guidance: neither the null half nor the weak model is evaluated.
        null_label: the class that stands for no label; None when the model has none. Unused with `weak`.
        channels: guide only this many leading channels (3 reproduces the original DiT and SiT); None guides all.
        weak: for autoguidance, a worse model of the same data, used instead of the null class and called like `model`.

    Raises:
        InputError: for guidance with neither a null class nor a weak model, a scale that is negative or not finite, an
            interval outside 0 <= low <= high <= 1, channels < 1 or more than there are.
    """
    require_guidance_ranges(scale, interval)
    if channels is not None and channels < 1:
        raise InputError(f"Guidance of {channels} channels does nothing: give at least 1, or none to guide all.")

    given = () if labels is None else (labels,)
    alone = _Labelled(model, given)
    if scale == 1:
        return alone
    if weak is not None:

        def with_weak(network: Callable[..., Tensor], x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return network(x, t, *given), weak(x, t, *given)

        return GuidedVelocity(with_weak, alone, scale, interval, channels)
    if labels is None or null_label is None:
        raise InputError(
            f"Guidance {scale} needs a model with classes and a null class, or a weak model; this one is "
            "unconditional: use guidance 1."
        )
    halves = torch.cat([labels, torch.full_like(labels, null_label)])

    def with_null(network: Callable[..., Tensor], x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        # Both halves in one batch: the same states with different labels.
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, halves).chunk(2)
        return conditional, unconditional

    return GuidedVelocity(with_null, alone, scale, interval, channels)


def require_guidance_ranges(scale: float, interval: tuple[float, float], what: str = "guidance") -> None:
    """Raise `InputError` for a scale or an interval out of range; `what` names the guidance."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise InputError(f"The {what} interval must satisfy 0 <= low <= high <= 1, not {low} {high}.")
    if not 0 <= scale < math.inf:
        raise InputError(f"The {what} scale must be a finite number >= 0, not {scale}; 1 is no {what}.")
