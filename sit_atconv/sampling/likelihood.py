"""Likelihood of images under a model: `python -m sit_atconv.sampling.likelihood --checkpoint MODEL --data DATA`."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sit_atconv.autoencoder import IDENTITY
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.latents import LatentDataset, refuse_damaged
from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.flow import ODE_METHODS, bits_per_dimension
from sit_atconv.models import SiT
from sit_atconv.models.checkpoint import load_model
from sit_atconv.randomness import Stream, keyed_generator
from sit_atconv.runtime.arguments import Parser, count
from sit_atconv.runtime.processes import process_state
from sit_atconv.runtime.whole_files import make_folder_of, write_json
from sit_atconv.sampling.arguments import seed, steps
from sit_atconv.sampling.draw import Drawing
from sit_atconv.sampling.encoded import EncodedBatch, encoded_batches, first_rows, require_same_data
from sit_atconv.sampling.settings import SamplerSettings

log = logging.getLogger(__name__)

_LEVELS = 255 / 2  # grey levels per unit of [-1, 1]


@dataclass(frozen=True)
class Likelihood:
    """Mean bits per dimension of a set of images, with its standard error.

    `of` is "8-bit pixels" (an upper bound by uniform dequantisation) or "latents" (a density on the model's own scale).
    """

    bits_per_dimension: float
    standard_error: float
    count: int
    of: str


def score_likelihood(
    model: SiT,
    dataset: LatentDataset,
    settings: SamplerSettings,
    *,
    rows: Sequence[int],
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[Tensor]:
    """Bits per dimension (b,) of the data set's rows under the model, batch by batch; see `bits_per_dimension`.

    Uniform noise of one grey level is added to pixels (identity autoencoder): the bits are then an upper bound on those
    of the 8-bit image. Noise, probes and posterior samples depend only on (seed, row).

    Raises:
        InputError: for guidance or an SDE, which have no such density, and for data with other latents.
    """
    if settings.guidance != 1 or settings.internal_guidance != 1:
        raise InputError("A guided field does not describe a learnt density: compute the likelihood without guidance.")
    if settings.solver not in ODE_METHODS:
        raise InputError(f"The likelihood follows the ODE: choose {', '.join(ODE_METHODS)}, not {settings.solver}.")
    require_same_data(model, dataset, "the data set")
    drawing = Drawing(model, settings)
    low, high = drawing.interpolant.time_range(model.config.prediction)
    pixels = dataset.latents.autoencoder == IDENTITY
    for batch in encoded_batches(model, dataset, rows, seed, batch_size):
        latents = _dequantise(batch, seed) if pixels else batch.latents
        with _frozen(model):
            bits = bits_per_dimension(
                drawing.velocity(batch.labels, model.device),
                latents,
                **drawing.ode_options,
                probe=_signs(batch, seed),
                start=low,
                end=high,
                samples=batch.rows,
            )
        yield bits.cpu() + (math.log2(_LEVELS) if pixels else 0.0)


@contextlib.contextmanager
def _frozen(model: SiT) -> Iterator[None]:
    """Do not compute gradients of the weights, which are not needed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _dequantise(batch: EncodedBatch, seed: int) -> Tensor:
    noise = [keyed_generator(seed, Stream.DEQUANTISATION, row).random(batch.latents.shape[1:]) for row in batch.rows]
    uniform = torch.stack([torch.from_numpy(values) for values in noise]).to(batch.latents)
    return batch.latents + (uniform - 0.5) / _LEVELS


def _signs(batch: EncodedBatch, seed: int) -> Tensor:
    """Hutchinson's probe: random signs, of the latents' shape."""
    shape = batch.latents.shape[1:]
    signs = [keyed_generator(seed, Stream.PROBE, row).integers(0, 2, shape) * 2 - 1 for row in batch.rows]
    return torch.stack([torch.from_numpy(values) for values in signs]).to(batch.latents)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m sit_atconv.sampling.likelihood", description=__doc__.split(":")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a model directory, or a checkpoint that holds one")
    add("--data", required=True, help="a prepared data set, or digits[:train|:heldout][@resolution]")
    add("--num-images", type=count, help="number of images, from the first (default: all)")
    add("--solver", choices=ODE_METHODS, default="heun")
    add("--steps", type=steps, default=50)
    add("--seed", type=seed, default=0)
    add("--batch-size", type=count, default=64, help="does not change the result")
    add("--json", type=Path)
    options = parser.parse_args(argv)
    with exit_on_input_error():
        device = process_state().device
        if options.json:
            make_folder_of(options.json)
        model, dataset = load_model(options.checkpoint).to(device), open_dataset(options.data)
        rows = first_rows(dataset, options.num_images)
        refuse_damaged(dataset.damaged(rows=rows))
        settings = replace(SamplerSettings(), solver=options.solver, steps=options.steps)
        scored = score_likelihood(model, dataset, settings, rows=rows, seed=options.seed, batch_size=options.batch_size)
        parts = []
        with tqdm(total=len(rows), unit="img", desc="likelihood") as progress:
            for part in scored:
                parts.append(part.double())
                progress.update(len(part))
        bits = torch.cat(parts)
        of = "8-bit pixels" if dataset.latents.autoencoder == IDENTITY else "latents"
        error = bits.std().item() / math.sqrt(len(bits))
        result = Likelihood(bits.mean().item(), error, len(bits), of)
        log.info(
            "%.4f ± %.4f bits per dimension of %s, %d images",
            result.bits_per_dimension,
            result.standard_error,
            result.of,
            result.count,
        )
        if options.json:
            write_json(options.json, {**vars(result), "settings": settings.to_dict()})


if __name__ == "__main__":
    main()
