"""Street View House Numbers, cropped digits: train_32x32.mat and others, in MATLAB's format 5.

`X` uint8 (32, 32, 3, N) and `y` (N, 1), where the digit 0 is labelled 10. http://ufldl.stanford.edu/housenumbers
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources.arrays import Arrays, ArraySource
from sit_atconv.errors import InputError

_ENDING = "_32x32.mat"
_ZERO = 10


def find(folder: Path) -> dict[str, list[Path]]:
    """split -> its file, of train, test and extra."""
    found = {split: folder / f"{split}{_ENDING}" for split in ("train", "test", "extra")}
    return {split: [path] for split, path in found.items() if path.is_file()}


def open_svhn(path: str, files: Sequence[Path], options: SourceOptions) -> ArraySource:
    """The digits of a file; classes are the digits 0 to 9."""
    return ArraySource("mat", path, partial(_load, files[0]), options)


def _load(file: Path) -> Arrays:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError("Files of MATLAB need scipy: pip install 'sit-atconv[eval]'.") from error
    try:
        found = loadmat(file, variable_names=("X", "y"))
    except Exception as error:  # damaged files fail in every way there is
        raise InputError(f"Cannot read {file} as a file of MATLAB 5: {error}. Was its download complete?") from error
    images, labels = found.get("X"), found.get("y")
    if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray) or images.ndim != 4:
        raise InputError(f"{file} is not one of SVHN: expected X (32, 32, 3, N) and y (N, 1).")
    return Arrays(np.ascontiguousarray(images.transpose(3, 0, 1, 2)), "X", np.where(labels == _ZERO, 0, labels), "y")
