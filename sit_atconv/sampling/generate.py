"""Generation as an iterable of finished batches, which a writer, a grid or the metrics consume."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sit_atconv.autoencoder import Autoencoder
from sit_atconv.errors import InputError, require_one_of
from sit_atconv.flow import ODE_METHODS, create_interpolant, guided_velocity, integrate_ode, integrate_sde
from sit_atconv.images import to_uint8
from sit_atconv.models import SiT
from sit_atconv.randomness import Stream, keyed_normal
from sit_atconv.sampling.labels import choose_labels

SOLVERS = (*ODE_METHODS, "sde")


@dataclass(frozen=True)
class SamplerSettings:
    """How to draw.

    Args:
        solver: "euler", "heun", "midpoint", "dopri5" (ODE) or "sde" (Euler-Maruyama).
        steps: N intervals; dopri5 chooses its own.
        guidance: guidance scale, 1 for none.
        interval: times (low, high) within which guidance acts.
        guidance_channels: guide only the first so many latent channels; None guides all.
        shift: timestep shift of the ODE solvers.
        diffusion, diffusion_scale, last_step, last_step_size: of the SDE, see `integrate_sde`.
        precision: "no", or "bf16" to run the network in autocast.
    """

    solver: str = "heun"
    steps: int = 50
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: int | None = None
    shift: float = 1.0
    diffusion: str = "sigma"
    diffusion_scale: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04
    precision: str = "no"

    def __post_init__(self) -> None:
        require_one_of(self.solver, SOLVERS, "solver")
        require_one_of(self.precision, ("no", "bf16"), "precision")
        if self.guidance == 1 and tuple(self.interval) != (0.0, 1.0):
            raise InputError("An interval without guidance does nothing: give a guidance scale other than 1.")


@dataclass(frozen=True)
class SampleBatch:
    """Finished samples on the CPU: images (b, 3, H, W) uint8, labels (b,) int64 or None, and their numbers."""

    images: Tensor
    labels: Tensor | None
    indices: list[int]


def generate(
    model: SiT,
    autoencoder: Autoencoder,
    indices: Iterable[int],
    settings: SamplerSettings | None = None,
    *,
    labels: str = "balanced",
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[SampleBatch]:
    """Draw the samples numbered `indices` of the run with this seed.

    Sample i is a function of the model, the settings, the labels' rule and (seed, i): not of the batch size, nor of
    what else is drawn (dopri5 alone chooses its steps by the batch, within its tolerance).

    Args:
        model: on the device to use; its own `config.input_size` is the latent's size.
        autoencoder: what decodes its latents.
        labels: see `choose_labels`.
    """
    settings = settings or SamplerSettings()
    indices = list(indices)
    for first in range(0, len(indices), batch_size):
        chunk = indices[first : first + batch_size]
        chosen = choose_labels(labels, chunk, model.config.num_classes, seed, model.config.class_names)
        with torch.inference_mode():
            latents = _draw_latents(model, chunk, chosen, settings, seed)
            if not latents.isfinite().all():
                raise InputError(
                    f"The model gave NaN or infinity for samples {chunk[0]} to {chunk[-1]}: check its weights."
                )
            images = to_uint8(autoencoder.decode(latents.float())).cpu()
        yield SampleBatch(images, chosen, chunk)


def latent_shape(model: SiT) -> tuple[int, int, int]:
    """(channels, height, width) of one latent at the model's training size."""
    size = model.config.input_size
    return (model.config.in_channels, *((size, size) if isinstance(size, int) else size))


def _draw_latents(
    model: SiT, indices: list[int], labels: Tensor | None, settings: SamplerSettings, seed: int
) -> Tensor:
    shape = latent_shape(model)
    noise = keyed_normal(seed, Stream.NOISE, indices, shape).to(model.device)
    velocity = guided_velocity(
        _autocast(model, settings.precision),
        None if labels is None else labels.to(model.device),
        settings.guidance,
        null_label=model.config.num_classes or None,
        interval=settings.interval,
        channels=settings.guidance_channels,
    )
    if settings.solver != "sde":
        return integrate_ode(velocity, noise, settings.steps, settings.solver, shift=settings.shift)
    return integrate_sde(
        velocity,
        noise,
        settings.steps,
        interpolant=create_interpolant(model.config.interpolant),
        diffusion=settings.diffusion,
        diffusion_scale=settings.diffusion_scale,
        last_step=settings.last_step,
        last_step_size=settings.last_step_size,
        noise=lambda step: keyed_normal(seed, Stream.INCREMENT, indices, shape, step),
    )


def _autocast(model: SiT, precision: str) -> Callable[..., Tensor]:
    def field(*inputs: Tensor) -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(*inputs)

    return field
