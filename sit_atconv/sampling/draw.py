"""Draws latents from keyed noise with a guided model and a solver."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.errors import InputError
from sit_atconv.flow import (
    create_interpolant,
    guided_velocity,
    integrate_ode,
    integrate_sde,
    internally_guided,
    velocity_from_prediction,
)
from sit_atconv.flow.field import OnStep, Velocity
from sit_atconv.flow.meanflow import AverageVelocity, integrate_average
from sit_atconv.models import SiT
from sit_atconv.randomness import Stream, keyed_normal
from sit_atconv.sampling.network import LabelTable, StepNetwork
from sit_atconv.sampling.settings import MEAN_FLOW, SDE_SOLVERS, SamplerSettings


class Drawing:
    """Draws latents of one model with one set of settings, batch by batch.

    Raises `InputError` when the settings ask for guidance that the model, or the weak model, does not allow.
    """

    def __init__(self, model: SiT, settings: SamplerSettings, weak: SiT | None = None) -> None:
        self.model, self.settings = model, settings
        self.interpolant = create_interpolant(model.config.interpolant)
        if settings.solver == MEAN_FLOW:
            require_flow_map(model)
        if weak is not None:
            require_same_space(model, weak)
            if settings.guidance == 1:
                raise InputError("A weak model without guidance does nothing: give a guidance scale other than 1.")
        else:
            require_guidance(model, settings.guidance)
        require_internal(model, settings.internal_guidance)
        if settings.guidance_channels is not None and not 0 < settings.guidance_channels <= model.config.in_channels:
            raise InputError(
                f"{settings.guidance_channels} channels cannot be guided: the model's latents have "
                f"{model.config.in_channels}."
            )
        self._network = StepNetwork(model, settings.precision, settings.compile)
        self._weak = None if weak is None else StepNetwork(weak, settings.precision, settings.compile)

    def latents(self, indices: list[int], labels: Tensor | None, seed: int) -> Tensor:
        """Normalised latents (b, C, h, w) fp32 of the samples numbered `indices`, for labels (b,) on the CPU.

        Raises `NonFiniteError`, which names the samples, when some become NaN or infinite.
        """
        shape, device = latent_shape(self.model), self.model.device
        noise = _to_device(keyed_normal(seed, Stream.NOISE, indices, shape), device)
        return self.integrate(
            noise,
            labels,
            increment=lambda step: _to_device(keyed_normal(seed, Stream.INCREMENT, indices, shape, step), device),
            samples=indices,
        )

    def integrate(
        self,
        noise: Tensor,
        labels: Tensor | None,
        increment: Callable[[int], Tensor] | None = None,
        samples: Sequence[int] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Integrate from noise (b, C, h, w) at t = 1 to latents, for labels (b,) on the CPU.

        `increment` returns the SDE's noise for a step. `samples` are the numbers that errors name. `on_step` is passed
        to the solver.
        """
        settings = self.settings
        if settings.solver == MEAN_FLOW:
            network, rest = self.average_velocity(labels, noise.device), {"samples": samples, "on_step": on_step}
            return integrate_average(network, noise, settings.steps, shift=settings.shift, **rest)
        low, high = self.interpolant.time_range(self.model.config.prediction)
        velocity = self.velocity(labels, noise.device)
        if settings.stochastic:
            return integrate_sde(
                velocity,
                noise,
                settings.steps,
                SDE_SOLVERS[settings.solver],
                interpolant=self.interpolant,
                start=high,
                diffusion=settings.diffusion,
                diffusion_scale=settings.diffusion_scale,
                last_step=settings.last_step,
                last_step_size=settings.last_step_size,
                noise=increment,
                samples=samples,
                on_step=on_step,
            )
        return integrate_ode(velocity, noise, **self.ode_options, start=high, end=low, samples=samples, on_step=on_step)

    @property
    def ode_options(self) -> dict[str, Any]:
        """Options of `integrate_ode` that are the same in both directions."""
        names = {"steps": "steps", "method": "solver", "shift": "shift", "atol": "atol", "rtol": "rtol"}
        return {name: getattr(self.settings, setting) for name, setting in names.items()}

    def velocity(self, labels: Tensor | None, device: torch.device) -> Velocity:
        """The guided field of (x, t) for labels (b,) on the CPU."""
        config = self.model.config
        table = None if labels is None else LabelTable.of(labels, config.num_classes, device)
        network = internally_guided(
            self._network.bind(table),
            self._network.bind(table, internal=True),
            self.settings.internal_guidance,
            self.settings.internal_interval,
        )
        guided = guided_velocity(
            network,
            None if table is None else table.rows,
            self.settings.guidance,
            null_label=None if table is None else table.null_row,
            interval=self.settings.interval,
            channels=self.settings.guidance_channels,
            weak=None if self._weak is None else self._weak.bind(table),
        )
        return velocity_from_prediction(guided, config.prediction, self.interpolant)

    def average_velocity(self, labels: Tensor | None, device: torch.device) -> AverageVelocity:
        """The average velocity of (x, t, r), of a flow map, for labels (b,) on the CPU."""
        table = None if labels is None else LabelTable.of(labels, self.model.config.num_classes, device)
        network, rows = self._network.bind(table), () if table is None else (table.rows,)
        return lambda x, t, r: network(x, t, *rows, r=r)


def latent_shape(model: SiT) -> tuple[int, int, int]:
    """(channels, height, width) of one latent at the model's training size."""
    size = model.config.input_size
    return (model.config.in_channels, *((size, size) if isinstance(size, int) else size))


def require_guidance(model: SiT, guidance: float, what: str = "Guidance") -> None:
    """Raise `InputError` unless the model's null class can guide with this scale; `what` names the scale's setting."""
    if guidance == 1:
        return
    if not model.config.num_classes:
        raise InputError(
            f"{what} {guidance} needs a model with classes, or a weak model: this one is unconditional. Give 1."
        )
    if model.config.label_dropout == 0:
        raise InputError(
            f"{what} {guidance} needs a null class, which this model never learned: it was trained without dropping "
            "labels (flow.label_dropout 0), or released without one. Give 1, or a weak model to guide away from."
        )


def require_internal(model: SiT, guidance: float, what: str = "Internal Guidance") -> None:
    """Raise `InputError` unless the model's own head can guide with this scale; `what` names the scale's setting."""
    if guidance != 1 and model.config.internal_block is None:
        raise InputError(
            f"{what} {guidance} needs a second head, which this model was not trained with (model.internal_block, as "
            "in configs/overlays/internal_guidance.yaml). Give 1."
        )


def require_flow_map(model: SiT) -> None:
    """Raise `InputError` unless the model predicts average velocities."""
    if model.config.meanflow_blocks is None:
        raise InputError(
            "The solver meanflow needs a model that was trained with flow.objective meanflow, and this one was not: "
            "take heun, or train it on with that objective (model.init_from; docs/techniques.md)."
        )


def require_same_space(model: SiT, weak: SiT) -> None:
    """Raise `InputError` unless the weak model makes the same prediction for the same latents and classes."""
    for key in ("in_channels", "num_classes", "interpolant", "prediction"):
        mine, other = model.config[key], weak.config[key]
        if mine != other:
            raise InputError(f"The weak model cannot guide: its {key} is {other}, the model's {mine}.")
    if model.classes.names and weak.classes.names and list(model.classes.names) != list(weak.classes.names):
        raise InputError("The weak model cannot guide: its class names are others, or in another order.")
    if model.config.latents and weak.config.latents:
        specs = (LatentSpec.from_dict(each.config.latents) for each in (model, weak))
        next(specs).require_same(next(specs), "the model", "the weak model")


def _to_device(noise: Tensor, device: torch.device) -> Tensor:
    """Copy noise to the device without waiting for it, from pinned memory."""
    return noise.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else noise.to(device)
