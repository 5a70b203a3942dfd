"""MNIST and its relatives (FashionMNIST, KMNIST, EMNIST): idx files, plain or gzipped, of grey pictures and of labels.

Format: two zero bytes, the type of numbers (8: bytes), how many axes, the length of each (4 bytes, big-endian), data.
http://yann.lecun.com/exdb/mnist, and https://www.nist.gov/itl/products-and-services/emnist-dataset for EMNIST, whose
pictures are stored with rows and columns exchanged.
"""

import gzip
import math
import re
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources.arrays import Arrays, ArraySource, labels_from_zero
from sit_atconv.errors import InputError

_IMAGES = re.compile(r"(?P<split>.+?)[-.]images[-.]idx3-ubyte(\.gz)?")
_EMNIST = "emnist-"
_BYTES = 8
_FROM_ONE = "letters"  # EMNIST's letters a, b, … are 1, 2, …


def find(folder: Path) -> dict[str, list[Path]]:
    """split -> its file of pictures, as train, test, or letters-train of EMNIST."""
    found = {}
    for path in sorted(folder.glob("*-ubyte*")):  # a plain file comes before its gzip
        if (match := _IMAGES.fullmatch(path.name)) and path.is_file():
            split = match["split"].removeprefix(_EMNIST)
            found.setdefault("test" if split == "t10k" else split, [path])
    return found


def open_idx(path: str, files: Sequence[Path], options: SourceOptions) -> ArraySource:
    """The pictures of an idx file, and the labels in the one beside it."""
    return ArraySource("idx", path, partial(_load, files[0], not options.unconditional), options)


def _load(file: Path, labelled: bool) -> Arrays:
    images = _read(file, axes=3)
    if file.name.startswith(_EMNIST):
        images = images.transpose(0, 2, 1)
    if not labelled:
        return Arrays(images, file.name)
    beside = file.with_name(re.sub(r"images([-.])idx3", r"labels\1idx1", file.name))
    beside = next((path for path in (beside, _other(beside)) if path.is_file()), None)
    if beside is None:
        raise InputError(f"{file.parent} has no labels for {file.name}. Fetch them, or give --unconditional.")
    labels, names = _read(beside, axes=1), None
    if file.name.startswith(_EMNIST):
        names = _class_names(file)
        if _FROM_ONE in file.name and labels.size and labels.min() == 1:
            labels = labels_from_zero(labels, str(beside))
    return Arrays(images, file.name, labels, beside.name, names)


def _other(path: Path) -> Path:
    """The gzip of a plain file, or the plain file of a gzip."""
    return path.with_suffix("") if path.suffix == ".gz" else path.with_name(path.name + ".gz")


def _read(path: Path, axes: int) -> np.ndarray:
    """The array of bytes in an idx file. Raises `InputError` if it is damaged or holds something else."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"Cannot read {path}: {error}. Was its download complete?") from error
    begin = 4 + 4 * axes
    if data[:4] != bytes((0, 0, _BYTES, axes)) or len(data) < begin:
        raise InputError(f"{path} is no idx file of bytes with {axes} axes. Fetch it again.")
    shape = np.frombuffer(data, ">u4", axes, 4).tolist()
    if math.prod(shape) != len(data) - begin:
        raise InputError(f"{path} declares {shape}, but {len(data) - begin:,} bytes follow. Was its download complete?")
    return np.frombuffer(data, np.uint8, offset=begin).reshape(shape)


def _class_names(file: Path) -> list[str] | None:
    """EMNIST's characters, if the mapping (label, code of a character, …) lies beside."""
    path = file.with_name(re.sub(r"-(train|test)-.*", "-mapping.txt", file.name))
    if not path.is_file():
        return None
    try:
        rows = [[int(word) for word in line.split()] for line in path.read_text("ascii").splitlines() if line.strip()]
        return ["".join(map(chr, codes)) for _, *codes in sorted(rows)]
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path} is no mapping of labels to characters ({error}). Fetch it again.") from error
