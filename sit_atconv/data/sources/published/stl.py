"""STL-10: train_X.bin, train_y.bin and others; pictures 96x96, column after column, channel after channel.

https://cs.stanford.edu/~acoates/stl10: labels are 1 … 10, and class_names.txt names the classes in that order.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources.arrays import Arrays, ArraySource
from sit_atconv.errors import InputError

_SIDE = 96
_PICTURE = 3 * _SIDE * _SIDE  # bytes


def find(folder: Path) -> dict[str, list[Path]]:
    """split -> its file of pictures."""
    found = {split: folder / f"{split}_X.bin" for split in ("train", "test", "unlabeled")}
    return {split: [path] for split, path in found.items() if path.is_file()}


def open_stl(path: str, files: Sequence[Path], options: SourceOptions) -> ArraySource:
    """The pictures of a file, memory-mapped; "unlabeled" has no classes."""
    return ArraySource("bin", path, partial(_load, files[0]), options)


def _load(file: Path) -> Arrays:
    size = file.stat().st_size
    if size == 0 or size % _PICTURE:
        raise InputError(f"{file} has {size:,} bytes, no multiple of {_PICTURE:,}. Was its download complete?")
    images = np.memmap(file, np.uint8, "r", shape=(size // _PICTURE, 3, _SIDE, _SIDE)).transpose(0, 3, 2, 1)
    beside = file.with_name(file.name.replace("_X", "_y"))
    if not beside.is_file():
        return Arrays(images, file.name)
    names = file.with_name("class_names.txt")
    labels = np.fromfile(beside, np.uint8)
    if labels.size and labels.min() == 0:
        raise InputError(f"{beside}: the label in row {int(labels.argmin())} is 0; STL-10 counts classes from 1.")
    text = names.read_text("utf-8", "replace").split() if names.is_file() else None
    return Arrays(images, file.name, labels.astype(np.int64) - 1, beside.name, text)
