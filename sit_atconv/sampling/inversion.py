"""Image → noise → image: `python -m sit_atconv.sampling.inversion --checkpoint MODEL --data DATA --out OUT`.

OUT/inversion.npz holds the noise and both images. OUT/grid.png shows them in rows of three: image, noise, image.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.latents import refuse_damaged
from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.flow import ODE_METHODS, invert
from sit_atconv.images import to_uint8
from sit_atconv.models import SiT
from sit_atconv.runtime.arguments import Parser, count
from sit_atconv.runtime.processes import process_state
from sit_atconv.runtime.whole_files import whole_file
from sit_atconv.sampling.arguments import seed, steps
from sit_atconv.sampling.draw import Drawing
from sit_atconv.sampling.encoded import encoded_batches, first_rows, require_same_data
from sit_atconv.sampling.run import open_generator
from sit_atconv.sampling.settings import SamplerSettings
from sit_atconv.sampling.writing.grid import save_grid

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inverted:
    """Latents, the noise that the ODE maps them to, and the latents sampled from that noise, all (b, C, h, w)."""

    latents: Tensor
    noise: Tensor
    returned: Tensor


@torch.no_grad()
def invert_latents(
    model: SiT, latents: Tensor, labels: Tensor | None, settings: SamplerSettings, samples: Sequence[int] | None = None
) -> Inverted:
    """Integrate the ODE from latents (b, C, h, w) to noise, and back on the same grid.

    Args:
        labels: (b,) on the CPU, or None for an unconditional model.
        samples: numbers of the samples, for error messages.

    Raises:
        InputError: for an SDE, which cannot be inverted.
    """
    if settings.solver not in ODE_METHODS:
        raise InputError(f"Inversion follows the ODE: choose {', '.join(ODE_METHODS)}, not {settings.solver}.")
    drawing = Drawing(model, settings)
    low, high = drawing.interpolant.time_range(model.config.prediction)
    noise = invert(
        drawing.velocity(labels, latents.device),
        latents,
        **drawing.ode_options,
        start=low,
        end=high,
        samples=samples,
    )
    return Inverted(latents, noise, drawing.integrate(noise, labels, samples=samples))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m sit_atconv.sampling.inversion", description=__doc__.split(":")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a model directory, or a checkpoint that holds one")
    add("--data", required=True, help="a prepared data set, or digits[:train|:heldout][@resolution]")
    add("--out", type=Path, required=True)
    add("--num-images", type=count, default=16, help="number of images, from the first")
    add("--solver", choices=ODE_METHODS, default="heun")
    add("--steps", type=steps, default=50)
    add("--seed", type=seed, default=0, help="of the autoencoder's posterior samples")
    options = parser.parse_args(argv)
    with exit_on_input_error():
        device = process_state().device
        (model, autoencoder), dataset = open_generator(options.checkpoint, device=device), open_dataset(options.data)
        require_same_data(model, dataset, options.data)
        rows = first_rows(dataset, options.num_images)
        refuse_damaged(dataset.damaged(rows=rows))
        (batch,) = encoded_batches(model, dataset, rows, options.seed, len(rows))
        settings = replace(SamplerSettings(), solver=options.solver, steps=options.steps)
        inverted = invert_latents(model, batch.latents, batch.labels, settings, batch.rows)
        pictures = [to_uint8(autoencoder.decode(z)).cpu() for z in vars(inverted).values()]
        options.out.mkdir(parents=True, exist_ok=True)
        save_grid(torch.stack(pictures, dim=1).flatten(0, 1), 3, options.out / "grid.png")
        before, _, after = (picture.permute(0, 2, 3, 1).numpy() for picture in pictures)
        with whole_file(options.out / "inversion.npz") as file:
            np.savez(file, noise=inverted.noise.cpu().numpy(), before=before, after=after)
        error = (before.astype(float) - after.astype(float)).std()
        log.info(
            "%d images came back with a PSNR of %.1f dB; their noise has standard deviation %.3f. %s",
            len(rows),
            20 * math.log10(255 / max(error, 1e-9)),
            inverted.noise.std().item(),
            options.out / "grid.png",
        )


if __name__ == "__main__":
    main()
