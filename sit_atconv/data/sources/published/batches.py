"""CIFAR-10, CIFAR-100 and ImageNet-32: batches of rows, one a picture, in pickles or (ImageNet-32) npz files.

Formats: https://www.cs.toronto.edu/~kriz/cifar.html and Chrabaszcz et al. 2017 (https://arxiv.org/abs/1707.08819).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources.arrays import Arrays, ArraySource, arrays_of_rows
from sit_atconv.data.sources.npz import npz_members, read_npz_member
from sit_atconv.errors import InputError
from sit_atconv.runtime.pickles import read_pickle

_FILES = {
    "train": ([f"data_batch_{n}" for n in range(1, 6)], ["train"], [f"train_data_batch_{n}" for n in range(1, 11)]),
    "test": (["test_batch"], ["test"]),
    "val": (["val_data"],),
}
_LABELS = ("labels", "fine_labels")
_NAMES = {"labels": ("label_names",), "fine_labels": ("fine_label_names",), "coarse_labels": ("coarse_label_names",)}
_META = ("batches.meta", "meta")
_PICKLE = b"\x80"


def find(folder: Path) -> dict[str, list[Path]]:
    """split -> its files, in order."""
    found = {}
    for split, series in _FILES.items():
        for names in series:
            both = [(folder / name, folder / f"{name}.npz") for name in names]
            files = [next(filter(_is_batch, pair), None) for pair in both]
            if any(files):
                found[split] = [path for path in files if path is not None]
    return found


def _is_batch(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".npz" or file.read(1) == _PICKLE


def open_batches(path: str, files: Sequence[Path], options: SourceOptions) -> ArraySource:
    """The pictures of some batches. CIFAR-100's labels are the fine ones, unless --label-key says coarse_labels.

    Raises `InputError` if a folder lacks batches of a split.
    """
    there = {file.stem for file in files}
    series = next(names for each in _FILES.values() for names in each if there & set(names))
    missing = [name for name in series if name not in there]
    if missing and Path(path).is_dir():
        raise InputError(f"{path} lacks {', '.join(missing)}. Fetch it again, or give a single file.")
    return ArraySource("batches", path, partial(_load, path, tuple(files), options.label_key), options)


def _load(path: str, files: Sequence[Path], label_key: str | None) -> Arrays:
    batches = [_read(file) for file in files]
    keys = [label_key] if label_key else [key for key in _LABELS if key in batches[0]][:1]
    images, labels = [], []
    for file, batch in zip(files, batches, strict=True):
        missing = [key for key in ("data", *keys) if key not in batch]
        if missing or not isinstance(batch["data"], np.ndarray):
            raise InputError(f"{file} holds no {(missing or ['data'])[0]}; it has {', '.join(batch)}.")
        values = np.asarray(batch[keys[0]]) if keys else None
        rows, values = arrays_of_rows(batch["data"], values, str(file))
        images.append(rows)
        labels.append(values)
    if len(sizes := {each.shape[1:] for each in images}) > 1:
        raise InputError(f"{path} mixes pictures of {' and '.join(map(str, sorted(sizes)))}.")
    if not keys:
        return Arrays(np.concatenate(images), "data")
    names = _class_names(files[0].parent, keys[0])
    return Arrays(np.concatenate(images), "data", np.concatenate(labels), keys[0], names)


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".npz":
        return {name: read_npz_member(str(file), name) for name in npz_members(str(file))}
    try:
        content = read_pickle(file.read_bytes(), str(file))
    except OSError as error:
        raise InputError(f"Cannot read {file}: {error.strerror}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}: expected a dictionary of arrays. Fetch it again.")
    return {_text(key): value for key, value in content.items()}


def _text(value: str | bytes) -> str:
    """Text that Python 2 wrote is bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _class_names(folder: Path, label_key: str) -> list[str] | None:
    for name in _META:
        if (folder / name).is_file():
            meta = _read(folder / name)
            for key in _NAMES.get(label_key, ()):
                if key in meta:
                    return [_text(each) for each in meta[key]]
    return None
