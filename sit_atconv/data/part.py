"""A part of a data set: some of its rows, such as those that training must not see."""

import hashlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sit_atconv.data.latents import LatentDataset
from sit_atconv.errors import InputError
from sit_atconv.randomness import Stream, keyed_generator

_SEED = 0  # of the choice of rows, which no run's seed changes


class Part(LatentDataset):
    """Rows of another data set. Messages name a sample by its file and row there.

    Args:
        whole: the other data set.
        rows: their numbers, (n,) int64.
    """

    def __init__(self, whole: LatentDataset, rows: np.ndarray) -> None:
        self._whole, self._rows = whole, rows
        self.latents, self.latent_shape = whole.latents, whole.latent_shape
        self.num_classes, self.class_names = whole.num_classes, whole.class_names
        self.has_flip, self.has_images, self.teachers = whole.has_flip, whole.has_images, whole.teachers
        self.empty_classes = sorted(set(range(self.num_classes)) - set(whole._labels(rows).unique().tolist()))

    def __len__(self) -> int:
        return len(self._rows)

    def damaged(self, process: int = 0, processes: int = 1, rows: range | None = None) -> list[str]:
        """See `LatentDataset.damaged`; of all files of the whole, since each of them may hold some of the rows."""
        return self._whole.damaged(process, processes)

    def fingerprint(self, teachers: Sequence[int] = ()) -> str:
        content = self._whole.fingerprint(teachers).encode() + self._rows.tobytes()
        return hashlib.sha256(content).hexdigest()

    def row(self, index: int) -> int:
        return int(self._rows[index])

    def where(self, index: int) -> str:
        return self._whole.where(self.row(index))

    def _moments(self, indices: Sequence[int], flips: Sequence[bool]) -> Tensor:
        return self._whole._moments(self._rows[indices].tolist(), flips)

    def _labels(self, indices: Sequence[int]) -> Tensor:
        return self._whole._labels(self._rows[indices].tolist())

    def _tokens(self, number: int, indices: Sequence[int], flips: Sequence[bool]) -> Tensor:
        return self._whole._tokens(number, self._rows[indices].tolist(), flips)

    def _image(self, index: int) -> np.ndarray:
        return self._whole._image(self.row(index))


def hold_out(dataset: LatentDataset, share: float) -> tuple[Part, Part]:
    """The rest of a data set, and the `share` of its rows that is held out: round(share · n) of n, at least one.

    The choice depends on n alone; a row's mirrored latents go with it. Those held out for a smaller share are among
    those for a larger one. Raises `InputError` when nothing would be left.
    """
    rest, held = held_out_rows(len(dataset), share)
    return Part(dataset, rest), Part(dataset, held)


def held_out_rows(length: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a data set of `length` that `hold_out` leaves, and those that it holds out, both sorted."""
    count = max(round(share * length), 1)
    if count >= length:
        raise InputError(
            f"Holding out a share of {share:g} takes {count} of {length} pictures and leaves none to train on: "
            "choose a smaller share, or other data to hold out."
        )
    order = keyed_generator(_SEED, Stream.HELD_OUT, length).permutation(length)
    return np.sort(order[count:]), np.sort(order[:count])
