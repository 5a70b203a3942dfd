"""Pictures in an npy file uint8 (N, H, W, 3), with labels in an npy beside it if its name says so."""

import re
from functools import partial
from pathlib import Path

import numpy as np

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources.arrays import Arrays, ArraySource
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import BAD_HEADER

# A word in the name of pictures -> words that stand in its place in the name of their labels.
_PAIRS = {
    "images": ("labels",), "imgs": ("labels",), "image": ("label", "labels"), "x": ("y",), "X": ("y", "Y"),
    "data": ("labels", "targets", "label"), "pictures": ("labels",),
}  # fmt: skip


def open_npy(path: str, options: SourceOptions) -> ArraySource:
    """The pictures of an npy, memory-mapped. Raises `InputError` as `ArraySource`, and for an npy of labels."""
    return ArraySource("npy", path, partial(_load, path, _labels_beside(Path(path))), options)


def _load(path: str, labels: str | None) -> Arrays:
    values = None if labels is None else _read(labels)
    return Arrays(_read(path), Path(path).stem, values, "" if labels is None else Path(labels).name)


def _labels_beside(path: Path) -> str | None:
    """The file of labels that goes with "train_images.npy", here "train_labels.npy"; None if there is none."""
    parts = re.split(r"([_\-.])", path.stem)
    found = set()
    for place, word in enumerate(parts):
        for other in _PAIRS.get(word, ()):
            beside = path.with_name("".join([*parts[:place], other, *parts[place + 1 :]]) + path.suffix)
            if beside.is_file():
                found.add(str(beside))
    if len(found) > 1:
        raise InputError(f"{path}: {' and '.join(sorted(found))} may both hold its labels: rename the other one.")
    return next(iter(found), None)


def _read(path: str) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, "r")
    except (OSError, EOFError, MemoryError, OverflowError, *BAD_HEADER) as error:
        raise InputError(f"Cannot read {path}: {error}. Expected an array of numpy.save, no pickles.") from error
