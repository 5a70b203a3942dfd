"""Batches of latents of a data set, as input of a checkpoint's model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sit_atconv.autoencoder import LatentSpec, sample_posterior
from sit_atconv.data.latents import LatentDataset
from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.randomness import Stream, keyed_normal


@dataclass(frozen=True)
class EncodedBatch:
    """Normalised latents (b, C, h, w) fp32 on the model's device, labels (b,) int64 on the CPU or None, row numbers."""

    latents: Tensor
    labels: Tensor | None
    rows: list[int]


def encoded_batches(
    model: SiT, dataset: LatentDataset, rows: Sequence[int], seed: int, batch_size: int
) -> Iterator[EncodedBatch]:
    """Latents of the data set's `rows`: posterior samples that depend only on (seed, row).

    Labels are the model's, by name where both have names. Raises `InputError` for a class that the model lacks.
    """
    for first in range(0, len(rows), batch_size):
        chunk = list(rows[first : first + batch_size])
        batch = dataset.read(chunk, [False] * len(chunk))
        noise = keyed_normal(seed, Stream.POSTERIOR, chunk, dataset.latent_shape)
        latents = sample_posterior(batch["moments"], noise, dataset.latents).to(model.device)
        yield EncodedBatch(latents, labels_for(model, dataset, batch["label"], chunk), chunk)


def labels_for(model: SiT, dataset: LatentDataset, labels: Tensor, rows: Sequence[int]) -> Tensor | None:
    """The model's labels, (b,) int64, for the data's `labels` (b,) of these rows; None for an unconditional model.

    By name where both have names. Raises `InputError` for a class that the model lacks.
    """
    if not model.config.num_classes:
        return None
    numbers = torch.tensor([-1 if n is None else n for n in dataset.classes.numbers_in(model.classes)])
    found = numbers[labels]
    if (found < 0).any():
        row = int(found.argmin())
        missing = dataset.classes.title(int(labels[row]))
        raise InputError(f"{dataset.where(rows[row])} is of the class '{missing}', which the model does not have.")
    return found


def require_same_data(model: SiT, dataset: LatentDataset, what: str, whose: str = "the checkpoint") -> None:
    """Raise `InputError` unless the data set, called `what`, has the latents and classes of the model.

    `whose` are the model's latents in the message.
    """
    config = model.config
    if config.latents is not None:
        LatentSpec.from_dict(config.latents).require_same(dataset.latents, whose, what)
    if dataset.latent_shape[0] != config.in_channels:
        raise InputError(f"{what} has latents of {dataset.latent_shape[0]} channels, the model {config.in_channels}.")
    named = model.classes.names and dataset.classes.names
    if config.num_classes and not (dataset.num_classes and (named or dataset.num_classes <= config.num_classes)):
        raise InputError(f"{what} has {dataset.num_classes} classes, the model {config.num_classes}.")


def first_rows(dataset: LatentDataset, count: int | None) -> range:
    """Rows 0 … count−1, or all. Raises `InputError` when the data set has fewer."""
    if count is not None and not 0 < count <= len(dataset):
        raise InputError(f"{count} images were asked for; the data set has {len(dataset)}.")
    return range(count or len(dataset))
