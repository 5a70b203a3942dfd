"""The interface of a data set of latents: rows of moments, labels and, on request, pictures."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from sit_atconv.alignment.cached import TeacherSpec, tokens_name
from sit_atconv.autoencoder import IDENTITY, LatentSpec
from sit_atconv.classes import Classes
from sit_atconv.errors import InputError
from sit_atconv.images import to_uint8

_SHOWN = 20  # of many faults


class LatentDataset(ABC):
    """Rows of latents. Picklable; every data loader worker opens files itself, when it first needs them.

    `latents` describes the autoencoder and its scale; `latent_shape` is (C, h, w); `num_classes` 0 means unlabelled
    (labels are then -1); `empty_classes` lists classes without a picture; `has_flip` and `has_images` say whether
    mirrored latents and pictures can be read; `teachers` lists the teachers whose tokens can be read.
    """

    latents: LatentSpec
    latent_shape: tuple[int, int, int]
    num_classes: int
    class_names: list[str] | None
    empty_classes: Sequence[int] = ()
    has_flip: bool
    has_images: bool
    teachers: Sequence[TeacherSpec] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def classes(self) -> Classes:
        """Numbers and names of the classes."""
        return Classes(self.num_classes, self.class_names, self.empty_classes)

    def damaged(self, process: int = 0, processes: int = 1, rows: range | None = None) -> list[str]:
        """What is wrong with this process's part of the files, a sentence for each that differs from its digest.

        `rows` limits it to the files that hold these. Data without digests have no such faults.
        """
        return []

    @abstractmethod
    def fingerprint(self, teachers: Sequence[int] = ()) -> str:
        """A SHA-256 of the data's contents, independent of their path: a copy has the same, other data another.

        Of cached tokens it covers only those of `teachers` (indices into `self.teachers`), so that other teachers may
        be added to the data.
        """

    def row(self, index: int) -> int:
        """The number of a sample in the whole data set, of which this one may be a part."""
        return index

    @abstractmethod
    def where(self, index: int) -> str:
        """File and row of a sample, for messages."""

    def read(
        self,
        indices: Sequence[int],
        flips: Sequence[bool],
        images: bool = False,
        teachers: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """Samples by index, mirrored where `flips` says so.

        Returns "moments" (n, 2C, h, w) fp16 or fp32 (mean, standard deviation), "label" (n,) int64, "image"
        (n, 3, H, W) uint8 if `images`, and "tokens_k" (n, N, D) fp16 for each k in `teachers`, an index into
        `self.teachers`. Raises `InputError` naming file and row for damaged samples.
        """
        if any(flips) and not self.has_flip:
            raise InputError("This data set holds no mirrored latents: prepare it with --flip, or train without flips.")
        batch = {"moments": self._moments(indices, flips), "label": self._labels(indices)}
        self._check(batch, indices)
        if images:
            batch["image"] = self._images(indices, flips, batch["moments"])
        return batch | {tokens_name(number): self._tokens(number, indices, flips) for number in teachers}

    @abstractmethod
    def _moments(self, indices: Sequence[int], flips: Sequence[bool]) -> Tensor: ...

    @abstractmethod
    def _labels(self, indices: Sequence[int]) -> Tensor: ...

    def _tokens(self, number: int, indices: Sequence[int], flips: Sequence[bool]) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} holds no teacher's tokens.")

    @abstractmethod
    def _image(self, index: int) -> np.ndarray:
        """The unmirrored picture uint8 (H, W, 3) of a sample."""

    def _images(self, indices: Sequence[int], flips: Sequence[bool], moments: Tensor) -> Tensor:
        """(n, 3, H, W) uint8, mirrored like the latents. Latents that are pixels need no decoding."""
        if self.latents.autoencoder == IDENTITY:
            return to_uint8(moments[:, : self.latents.channels].expand(-1, 3, -1, -1))
        height, width = (side * self.latents.downscale for side in self.latent_shape[1:])
        images = empty_batch((len(indices), 3, height, width), torch.uint8)
        for row, index, flip in zip(images.numpy(), indices, flips, strict=True):
            image = self._image(index)
            if image.shape != (height, width, 3):
                raise InputError(f"{self.where(index)}: the picture is {image.shape}, not {(height, width, 3)}.")
            row[:] = (image[:, ::-1] if flip else image).transpose(2, 0, 1)
        return images

    def _check(self, batch: dict[str, Tensor], indices: Sequence[int]) -> None:
        # NaN and infinity survive a sum, which is fifteen times as fast as testing every value.
        finite = torch.isfinite(batch["moments"].flatten(1).sum(1, dtype=torch.float32))
        if not finite.all():
            raise InputError(f"{self.where(indices[int(finite.int().argmin())])}: the latent holds NaN or infinity.")
        label = batch["label"]
        outside = (label < 0) | (label >= self.num_classes)
        if self.num_classes and outside.any():
            row = int(outside.int().argmax())
            raise InputError(
                f"{self.where(indices[row])}: label {int(label[row])} is outside 0…{self.num_classes - 1}."
            )


def refuse_damaged(faults: Sequence[str], otherwise: str = "") -> None:
    """Raise `InputError` that tells what `LatentDataset.damaged` has found; `otherwise` is what else could be done."""
    if faults:
        raise InputError(
            f"{' '.join(faults[:_SHOWN])} Copy {len(faults)} such file(s) again, or prepare the data anew{otherwise}."
        )


def empty_batch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor to be filled row by row.

    In a data loader worker it is allocated in shared memory, as in DataLoader's own collation, so that sending it to
    the training process needs no copy.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)
