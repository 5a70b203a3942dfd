"""What an autoencoder alone loses: pictures are encoded and decoded, and the results are compared with the pictures.

The Fréchet distance between the two is called rFID (arXiv 2112.10752, table 8, with PSNR; arXiv 2501.01423). Encoding
takes the posterior's mean and draws nothing, as diffusers' `AutoencoderKL` does when it is called on a picture.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from sit_atconv.autoencoder import Autoencoder, load_autoencoder
from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.errors import InputError
from sit_atconv.evaluation.evaluate import Options, SampleStream, evaluate, wanted_to_score
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.features.spaces import Spaces
from sit_atconv.evaluation.reading.classes import source_classes
from sit_atconv.evaluation.reading.loading import Batch, image_digests, load_batches, open_images, share
from sit_atconv.evaluation.reading.references import Reading, reference_of_images
from sit_atconv.evaluation.reading.stored import is_statistics
from sit_atconv.evaluation.report import Report
from sit_atconv.evaluation.scoring.choice import choose_metrics
from sit_atconv.images import to_float, to_uint8

_RENAMED = (
    "fid",
    "sfid",
    "is",
    "fd",
    "kid",
    "mind",
    "cmmd",
)  # rfid, rsfid, ...: never to be taken for those of generated samples


def score_autoencoder(name: str, path: str, features: Features | Sequence[Features], options: Options) -> Report | None:
    """Compare the pictures of the source `path` with what the autoencoder `name` makes of them.

    By default without precision and recall. PSNR, in decibels, is the mean over pictures of 10 log₁₀(255² / mean
    squared error). Every process calls it; the main process gets the report, the others None.

    Raises:
        InputError: for an autoencoder that cannot be loaded, and a source that holds no pictures, or pictures of sizes
            that the autoencoder does not take.
    """
    if is_statistics(path):
        raise InputError(f"{path} holds no pictures: --autoencoder encodes and decodes those of --reference.")
    source = open_images(path, options.reading.unconditional)
    with PartialState().main_process_first():  # the main process may download the weights
        autoencoder = load_autoencoder(name, device=Spaces(features).device)
    autoencoder.require_divisible(*source[0].image.shape[:2])

    spaces = Spaces(features)
    default = tuple(m.name for m in choose_metrics(spaces, None) if m.root not in ("precision", "recall"))
    options = replace(options, metrics=options.metrics or default)
    wanted = wanted_to_score(spaces, options)
    own = None if source.labels is None else source_classes(source)
    target = reference_of_images(source, path, spaces, wanted, options.reading, options.classes, own)
    reconstructions = Reconstructions(autoencoder, source, options.reading)
    report = evaluate(reconstructions.stream(path), target, features, options)
    errors = reconstructions.errors()
    return None if report is None else _renamed(report, errors)


class Reconstructions:
    """This process's share of a source's pictures, encoded and decoded, with the error of each."""

    def __init__(self, autoencoder: Autoencoder, source: ImageSource, reading: Reading) -> None:
        self._autoencoder, self._source, self._reading = autoencoder, source, reading
        self._errors: list[Tensor] = []

    def stream(self, path: str) -> SampleStream:
        """The reconstructions, for `evaluate`. `path` names the source."""
        state, spec = PartialState(), self._autoencoder.spec
        mine = share(len(self._source), state.process_index, state.num_processes)
        facts = {
            "path": f"{path} through {spec.autoencoder}",
            "kind": "reconstructions",
            "autoencoder": spec.autoencoder,
            "autoencoder_sha256": spec.weights_hash,
            "latents": "posterior mean",
        }
        return SampleStream(self._batches(mine), mine.start, len(mine), facts)

    def errors(self) -> Tensor:
        """The mean squared error of every picture, in grey levels, (n,) float64. All processes call it."""
        return torch.cat(gather_object(self._errors) or [torch.empty(0)])

    def _batches(self, indices: range) -> Iterator[Batch]:
        spec = self._autoencoder.spec
        for batch in load_batches(self._source, indices, self._reading.batch_size, self._reading.workers):
            means = self._autoencoder.encode(to_float(batch.images)).chunk(2, dim=1)[0]
            images = to_uint8(self._autoencoder.decode(spec.normalise(means))).cpu()
            self._errors.append((images.double() - batch.images.double()).square().mean((1, 2, 3)))
            yield Batch(images, batch.labels, image_digests(images))


def _renamed(report: Report, errors: Tensor) -> Report:
    """The report with PSNR, and with "r" before the names of what is otherwise known of generated samples."""

    def renamed(values: dict) -> dict:
        return {
            f"r{name}" if name.split("_")[0].split("@")[0] in _RENAMED else name: value
            for name, value in values.items()
        }

    metrics, unsupported = renamed(report.metrics), renamed(report.unsupported)
    if exact := int((errors == 0).sum()):
        unsupported["psnr"] = f"it is infinite, since {exact} pictures are reproduced exactly"
    else:
        metrics["psnr"] = float((10 * (math.log10(255**2) - errors.log10())).mean())
    renamed_too = {"intervals": renamed(report.intervals), "floors": renamed(report.floors)}
    return replace(report, metrics=metrics, unsupported=unsupported, **renamed_too)
