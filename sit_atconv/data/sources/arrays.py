"""Pictures of one array as a source: of npz and npy files, and of published data sets."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sit_atconv.classes import read_labels
from sit_atconv.data.pictures.protocol import SourceImage, SourceOptions
from sit_atconv.errors import InputError

log = logging.getLogger(__name__)


class Arrays(NamedTuple):
    """`images` uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W), called `image_key`; `labels` as `read_labels` takes them,
    or None, called `label_key`; `class_names` of classes 0, 1, … or None."""

    images: np.ndarray
    image_key: str
    labels: Sequence[Any] | np.ndarray | None = None
    label_key: str = ""
    class_names: Sequence[str] | None = None


class ArraySource:
    """Pictures of an array, as an `ImageSource`. `load` reads or maps it, and is called anew in every process.

    Raises `InputError` when the array holds no pictures, or when there is not one label for each.
    """

    lossy = False
    names = None

    def __init__(self, kind: str, path: str, load: Callable[[], Arrays], options: SourceOptions) -> None:
        self.kind, self.path, self._load = kind, str(path), load
        arrays = load()
        _check_images(self.path, arrays.image_key, arrays.images, options.convert)
        self._images, self.image_key, self._count = arrays.images, arrays.image_key, len(arrays.images)
        self.labels = self.class_names = None
        if arrays.labels is not None and not options.unconditional:
            where = f"{self.path}: {arrays.label_key}"
            self.labels, self.class_names = read_labels(arrays.labels, where, arrays.class_names)
            if len(self.labels) != self._count:
                raise InputError(f"{where} holds {len(self.labels)} labels for {self._count} images.")
            if options.convert and self.labels.min() == 1:
                log.warning("%s: no label is 0. Labels stay as they are, so class 0 has no picture.", where)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> SourceImage:
        image = np.array(self._open_images()[index])
        image = image if image.ndim == 3 else image[..., None]
        image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
        label = None if self.labels is None else int(self.labels[index])
        return SourceImage(image, label, f"{os.path.basename(self.path)}:{self.image_key}[{index}]")

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_images"}

    def _open_images(self) -> np.ndarray:
        if "_images" not in self.__dict__:
            self._images = self._load().images
        return self._images


def arrays_of_rows(rows: np.ndarray, labels: np.ndarray | None, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Square RGB pictures (N, S, S, 3) from rows (N, 3·S·S), channel after channel, as CIFAR and ImageNet-32 hold them.

    Labels from 1 to 1000 are those of ImageNet-32, and counted from 0. Raises `InputError` for rows of another length.
    """
    side = round((rows.shape[1] / 3) ** 0.5) if rows.ndim == 2 else 0
    if rows.ndim != 2 or 3 * side * side != rows.shape[1]:
        raise InputError(f"{where} has shape {rows.shape}: expected rows of 3 x S x S numbers, such as (N, 3072).")
    if labels is not None and labels.dtype.kind in "iu" and labels.size and (labels.min(), labels.max()) == (1, 1000):
        labels = labels_from_zero(labels, where)
    return rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1), labels


def labels_from_zero(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels of a format that counts its classes from 1, counted from 0."""
    log.info("%s: its classes %d … %d are numbered from 0 here.", where, labels.min(), labels.max())
    return labels.astype(np.int64) - 1


def choose_split(path: str, splits: Sequence[str], part: str | None) -> str:
    """The split that `part` names, or the only one. Raises `InputError` if a choice is needed, or is none of them."""
    if part is None and len(splits) == 1:
        return splits[0]
    if part is None:
        raise InputError(f"{path} holds splits ({', '.join(splits)}): choose one, as {path}:{splits[0]}.")
    if part not in splits:
        raise InputError(f"{path} has no split '{part}'; it has {', '.join(splits) or 'none'}.")
    return part


def _check_images(path: str, key: str, images: np.ndarray, convert: bool) -> None:
    """Refuse everything except uint8 pictures, channels last, with values from 0 to 255."""
    expected = "Expected uint8 (N, H, W, 3) with values from 0 to 255"
    shape, grey = images.shape, images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1)
    if images.dtype != np.uint8:
        raise InputError(f"{path}: {key} is {images.dtype}. {expected}: scale and round the images before saving.")
    if images.ndim == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        raise InputError(f"{path}: {key} has shape {shape}, channels first. {expected}: transpose it to (0, 2, 3, 1).")
    if not (grey or (images.ndim == 4 and shape[3] == 3)):
        raise InputError(f"{path}: {key} has shape {shape}. {expected}.")
    if grey and not convert:
        raise InputError(f"{path}: {key} of shape {shape} is greyscale. {expected}: repeat the channel three times.")
    if 0 in shape:
        raise InputError(f"{path}: {key} is empty (shape {shape}).")
    if images[:: max(1, len(images) // 64)].max() <= 1:
        raise InputError(f"{path}: {key} holds only 0 and 1: it was cast before it was scaled. {expected}.")
