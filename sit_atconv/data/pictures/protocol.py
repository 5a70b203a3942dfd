"""The interface of an image source: a sized, ordered collection of RGB pictures with optional labels."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class SourceOptions:
    """How pictures are read.

    convert: greyscale, palette, CMYK, alpha and 16-bit pictures become RGB (preparation); otherwise they are refused
    (evaluation). unconditional: labels are not read. image_key, label_key: the names of the arrays or columns to read,
    where they are not the usual ones. exif: pictures are turned as their EXIF orientation says. bits: how many bits
    16-bit grey pictures use (12 for many cameras and scanners); None means all.
    """

    convert: bool = False
    unconditional: bool = False
    image_key: str | None = None
    label_key: str | None = None
    exif: bool = False
    bits: int | None = None


@dataclass(frozen=True)
class SourceImage:
    """One picture: `image` uint8 (H, W, 3) RGB, its class or None, and a name by which the user can find it.

    `turned`: it has an EXIF orientation. `bits`: of a 16-bit picture, how many bits its brightest pixel needs.
    """

    image: np.ndarray
    label: int | None
    name: str
    turned: bool = False
    bits: int | None = None


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
