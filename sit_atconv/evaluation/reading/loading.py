"""Loads the pictures of a source in file order as uint8 batches, with worker processes."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sit_atconv.data.pictures.protocol import ImageSource, SourceImage, SourceOptions
from sit_atconv.data.pictures.remarks import Remarks
from sit_atconv.data.sources import open_source, require_undamaged
from sit_atconv.errors import InputError
from sit_atconv.runtime.processes import end_when_unable_to_send


@dataclass(frozen=True)
class Batch:
    """uint8 images (b, 3, H, W), labels (b,) int64 or None, and each image's digest, (b, 32) bytes."""

    images: Tensor
    labels: Tensor | None
    digests: np.ndarray


def image_digests(images: Tensor) -> np.ndarray:
    """SHA-256 of each image's size and pixels (rows of RGB), (b, 32) uint8: the same from a PNG, an npz or memory."""
    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return np.stack([_digest(image) for image in pixels]) if len(pixels) else np.empty((0, 32), np.uint8)


def open_images(path: str, unconditional: bool = False) -> ImageSource:
    """Open pictures to score, with their labels unless `unconditional`.

    Raises `InputError` for a source that is missing, unusable or damaged.
    """
    source = open_source(path, options=SourceOptions(unconditional=unconditional))
    require_undamaged(source)
    return source


def share(count: int, process: int, processes: int) -> range:
    """This process's part of `count` images: contiguous, in file order, and as even as possible."""
    return range(count * process // processes, count * (process + 1) // processes)


def load_batches(source: ImageSource, indices: Sequence[int], batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """The images of `source` at `indices`, in that order.

    Raises `InputError` when their sizes differ, or when the source cannot read a picture.
    """
    loader = DataLoader(
        _Pictures(source, indices),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=end_when_unable_to_send,
        pin_memory=torch.cuda.is_available(),
    )
    remarks = Remarks()
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        remarks += batch["remarks"]
        yield Batch(batch["images"], batch.get("labels"), batch["digests"].numpy())
    remarks.say(source.kind, SourceOptions())


class _Pictures(Dataset):
    """Map-style view of a source. Errors of a picture are returned instead of raised: raised in a worker process, they
    would reach the user with the worker's traceback."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> SourceImage | InputError:
        try:
            return self._source[self._indices[position]]
        except InputError as error:
            return error


def _collate(pictures: list[SourceImage | InputError]) -> dict[str, Any] | InputError:
    for picture in pictures:
        if isinstance(picture, InputError):
            return picture
        if picture.image.shape != pictures[0].image.shape:
            return mixed_sizes(pictures[0].image.shape[:2], picture.image.shape[:2], picture.name)
    pixels = np.stack([picture.image for picture in pictures])
    batch: dict[str, Any] = {
        "remarks": Remarks.of(pictures),
        "images": torch.from_numpy(pixels).permute(0, 3, 1, 2),
        "digests": torch.from_numpy(np.stack([_digest(image) for image in pixels])),
    }
    if pictures[0].label is not None:
        batch["labels"] = torch.tensor([picture.label for picture in pictures], dtype=torch.int64)
    return batch


def require_labels(labels: object, what: str) -> None:
    """Raise `InputError` unless there are labels; `what` names the images, such as "samples"."""
    if labels is None:
        raise InputError(
            f"The {what} have no labels. Comparing class by class needs class folders, arr_1 in the npz, a labelled "
            "data set or a checkpoint of a conditional model."
        )


def require_two_of_each(labels: np.ndarray, titles: Mapping[int, str], what: str) -> None:
    """Raise `InputError` unless at least two of `labels` (n,) are of each class; `titles` names the classes."""
    for label, title in titles.items():
        if (count := int((labels == label).sum())) < 2:
            raise InputError(f"There are {count} {what} of class {title}; a distance needs two on each side.")


def require_two(count: int, what: str) -> None:
    """Raise `InputError` for fewer than two images, which have no covariance and hence no Fréchet distance."""
    if count < 2:
        raise InputError(f"The number of {what} is {count}: a distance needs at least two on each side.")


def mixed_sizes(first: Sequence[int], other: Sequence[int], name: str) -> InputError:
    """The error for images (H, W) of more than one size."""
    return InputError(
        f"Images differ in size: {name} is {other[1]}x{other[0]}, others are {first[1]}x{first[0]}. All images of a "
        "set must have the same size: crop or resize them first (python -m sit_atconv.data.prepare does)."
    )


def _digest(image: np.ndarray) -> np.ndarray:
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image))
    return np.frombuffer(digest.digest(), dtype=np.uint8)
