"""Pictures with classes, from any of our sources, as an image network is trained and measured on them."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sit_atconv.data.part import held_out_rows
from sit_atconv.data.pictures.protocol import ImageSource, SourceOptions
from sit_atconv.data.sampler import CheckedLoader
from sit_atconv.data.sources.open import open_source
from sit_atconv.errors import InputError

_READ = SourceOptions(convert=True, exif=True)  # grey and CMYK pictures are among ImageNet's


class Pictures:
    """Some or all pictures of a source that has classes.

    Args:
        path: the source's, for messages.
        source: the pictures.
        rows: numbers of those that are meant, (n,) int64.
    """

    def __init__(self, path: str, source: ImageSource, rows: np.ndarray) -> None:
        self.path, self._source, self.rows = path, source, rows
        self.labels = np.asarray(source.labels)[rows]
        self.num_classes = int(source.labels.max()) + 1 if source.class_names is None else len(source.class_names)
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.rows)

    def picture(self, index: int) -> Image.Image:
        """An RGB picture. Raises `InputError` when it cannot be decoded."""
        return Image.fromarray(self._source[int(self.rows[index])].image)

    @cached_property
    def fingerprint(self) -> str:
        """Of names, labels and rows; what is in the pictures is not read."""
        digest = hashlib.sha256(repr((self._source.names, self.class_names)).encode())
        digest.update(self.labels.astype(np.int64).tobytes() + self.rows.astype(np.int64).tobytes())
        return digest.hexdigest()

    def split(self, share: float) -> tuple["Pictures", "Pictures"]:
        """The rest, and the `share` that is held out, chosen as by `sit_atconv.data.part.hold_out`."""
        rest, held = held_out_rows(len(self), share)
        return tuple(Pictures(self.path, self._source, self.rows[rows]) for rows in (rest, held))


def open_pictures(path: str) -> Pictures:
    """The pictures of any source of docs/own_data.md. Raises `InputError` for one that is missing or has no classes."""
    source = open_source(path, options=_READ)
    if source.labels is None:
        raise InputError(
            f"{path} has no classes, which a classifier needs: expected one folder a class, or labels beside the "
            "pictures (docs/own_data.md)."
        )
    return Pictures(path, source, np.arange(len(source)))


class Shown(Dataset):
    """Lists of indices -> {"image": (b, 3, H, W), "label": (b,)}, as a `transform` of PIL images shows pictures."""

    def __init__(self, pictures: Pictures, transform: Callable[[Image.Image], Tensor]) -> None:
        self._pictures, self._transform = pictures, transform

    def __getitem__(self, indices: Sequence[int]) -> "dict[str, Tensor] | InputError":
        try:
            images = [self._transform(self._pictures.picture(index)) for index in indices]
        except InputError as error:
            return error  # see CheckedLoader
        return {"image": torch.stack(images), "label": torch.from_numpy(self._pictures.labels[list(indices)])}


def picture_loader(shown: Dataset, batches: Iterable[Sequence[int]], workers: int) -> DataLoader:
    """The batches of these lists of indices, in order."""
    return CheckedLoader(shown, batch_size=None, sampler=list(batches), num_workers=workers)
