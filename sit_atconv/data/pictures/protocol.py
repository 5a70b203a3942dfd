"""The interface of an image source: a sized, ordered collection of RGB pictures with optional labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sit_atconv.errors import InputError

MAX_LABEL = 10**6


@dataclass(frozen=True)
class SourceImage:
    """One picture: `image` uint8 (H, W, 3) RGB, its class or None, and a name by which the user can find it."""

    image: np.ndarray
    label: int | None
    name: str


class ImageSource(Protocol):
    """Pictures in a fixed, sorted order. Picklable, so that data loader workers can read it.

    `labels` is int64 (len,) or None for an unlabelled source; `class_names` are the names of classes 0, 1, … or None;
    `lossy` says whether any picture was stored in a lossy format; `names` are the pictures' file names, or None if
    pictures are not separate files.
    """

    kind: str
    names: list[str] | None
    labels: np.ndarray | None
    class_names: list[str] | None
    lossy: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SourceImage: ...


def as_labels(labels: Sequence[int] | np.ndarray, path: str) -> np.ndarray:
    """Labels as int64. Raises `InputError` above `MAX_LABEL`: the label embedding has a row for every number below."""
    if (largest := max(labels, default=0)) > MAX_LABEL:
        raise InputError(f"{path} holds the label {largest}: labels must be class numbers from 0 to {MAX_LABEL}.")
    return np.array(labels, dtype=np.int64)
