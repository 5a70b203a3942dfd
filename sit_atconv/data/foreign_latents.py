"""What the readers of latents that others prepared share."""

import contextlib
import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.data.latents import LatentDataset, empty_batch
from sit_atconv.errors import InputError

_SAMPLED = 64  # latents that a fingerprint covers


class ForeignLatents(LatentDataset):
    """Latents that another program wrote, of the autoencoder that the user names; without pictures.

    `names` are the names of the files, one for each latent, or None. `remark` tells the user what is special about
    them. A subclass reads one latent at a time.
    """

    has_images = False
    has_flip = False
    remark = ""

    def __init__(
        self,
        path: str,
        spec: LatentSpec,
        count: int,
        labels: np.ndarray | None,
        class_names: list[str] | None,
        names: list[str] | None = None,
    ) -> None:
        self.path, self.latents, self._count = path, spec, count
        self.names, self.labels, self.class_names = names, labels, class_names
        self._targets = np.full(count, -1) if labels is None else labels
        self.num_classes = 0 if labels is None else len(class_names or ()) or int(labels.max()) + 1
        self.empty_classes = sorted(set(range(self.num_classes)) - set(self._targets.tolist()))
        self._first = self._first_readable()
        self.latent_shape = (spec.channels, *self._row(self._first, False).shape[1:])
        self.resolution = tuple(side * spec.downscale for side in self.latent_shape[1:])

    @abstractmethod
    def _row(self, index: int, flip: bool) -> np.ndarray:
        """Mean and standard deviation (2C, h, w) of a picture, or of the mirrored one, before normalisation."""

    def __len__(self) -> int:
        return self._count

    def where(self, index: int) -> str:
        return f"{self.path}/{self.names[index]}" if self.names else f"{self.path}, latent {index}"

    def fingerprint(self, teachers: Sequence[int] = ()) -> str:
        """Covers all names and labels but only some latents: there may be millions of files."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        digest.update(np.ascontiguousarray(self._targets, dtype=np.int64))
        for index in np.linspace(0, len(self) - 1, min(_SAMPLED, len(self)), dtype=int):
            with contextlib.suppress(InputError, OSError):  # named when a batch reads it
                digest.update(self._digested(int(index)))
        return digest.hexdigest()

    def _digested(self, index: int) -> bytes:
        """What the fingerprint covers of a latent."""
        return self._row(index, False).tobytes()

    def _first_readable(self) -> int:
        """The first latent that can be read; damaged ones are named when a batch reads them."""
        failures = []
        for index in range(len(self)):
            try:
                self._row(index, False)
                return index
            except InputError as error:
                failures.append(error)
        raise failures[0]

    def _moments(self, indices: Sequence[int], flips: Sequence[bool]) -> Tensor:
        expected = (2 * self.latent_shape[0], *self.latent_shape[1:])
        moments = empty_batch((len(indices), *expected), torch.float32)
        for out, index, flip in zip(moments.numpy(), indices, flips, strict=True):
            row = self._row(index, flip)
            if row.shape != expected:
                raise InputError(f"{self.where(index)}: shape {row.shape} among latents of {expected}.")
            out[:] = row
        return moments

    def _labels(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._targets[np.asarray(indices)]).long()

    def _image(self, index: int) -> np.ndarray:
        raise InputError(f"{self.path} holds no pictures.")

    def _checked(self, array: np.ndarray, channels: int, index: int) -> np.ndarray:
        """The array as fp32. Raises `InputError` unless it holds `channels` maps of floating point numbers."""
        if array.ndim != 3 or array.shape[0] != channels or array.dtype.kind != "f" or 0 in array.shape:
            raise InputError(
                f"{self.where(index)}: {array.dtype} {array.shape}, expected floating point ({channels}, h, w) of the "
                f"autoencoder {self.latents.autoencoder}, which has {self.latents.channels} channels."
            )
        return array.astype(np.float32)

    def _certain(self, sample: np.ndarray, index: int) -> np.ndarray:
        """The moments of a sample (C, h, w): itself, with standard deviation 0."""
        sample = self._checked(sample, self.latents.channels, index)
        return np.concatenate([sample, np.zeros_like(sample)])
