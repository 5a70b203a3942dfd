"""Sampling as an iterable of finished batches, which a writer, a grid or the metrics consume."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from sit_atconv.autoencoder import Autoencoder
from sit_atconv.models import SiT
from sit_atconv.sampling.decoding import Decoder, Decoding
from sit_atconv.sampling.draw import Drawing
from sit_atconv.sampling.labels import choose_labels
from sit_atconv.sampling.settings import SamplerSettings


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
    labels: str | Sequence[int] = "balanced",
    seed: int = 0,
    batch_size: int = 64,
    weak: SiT | None = None,
) -> Iterator[SampleBatch]:
    """Draw the samples numbered `indices` for this seed; on a GPU each batch is decoded while the next one is drawn.

    Sample i depends only on the model, the settings, the label rule and (seed, i), not on the batch size or the other
    samples.

    Args:
        model: on the device to use; its `config.input_size` is the size of the latents.
        autoencoder: decodes the latents.
        labels: see `choose_labels`.
        weak: a model to guide away from (autoguidance), instead of the null class.

    Raises:
        InputError: before the first network evaluation, for labels or settings that the models do not support.
        NonFiniteError: when samples become NaN or infinite; it names them and the step.
    """
    drawing, decoder = Drawing(model, settings or SamplerSettings(), weak), Decoder(autoencoder)
    pending, numbers = None, iter(indices)
    while chunk := list(islice(numbers, batch_size)):
        chosen = choose_labels(labels, chunk, model.classes, seed)
        with torch.inference_mode():
            decoding = decoder.start(drawing.latents(chunk, chosen, seed))
        if pending is not None:
            yield _finish(*pending)
        pending = decoding, chosen, chunk
        if not decoder.overlaps:
            yield _finish(*pending)
            pending = None
    if pending is not None:
        yield _finish(*pending)


def _finish(decoding: Decoding, labels: Tensor | None, indices: list[int]) -> SampleBatch:
    return SampleBatch(decoding.wait(), labels, indices)
