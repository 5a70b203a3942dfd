"""The order of training data: a pure function of (seed, position), so a run's only data state is one integer.

Position p is sample permutation(seed, epoch)[p mod N] of epoch p // N. With G samples per optimizer step, global step s
covers positions [s·G, (s + 1)·G), however many processes and micro-batches it is split into.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sit_atconv.data.dataset import LatentDataset
from sit_atconv.errors import InputError
from sit_atconv.randomness import Stream, keyed_generator, keyed_uniform


# Two permutations, because a batch may span two epochs.
@functools.lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return keyed_generator(seed, Stream.ORDER, epoch).permutation(length)


def index_at(position: int, length: int, seed: int) -> int:
    """The sample (0 … length - 1) at a position (0, 1, …) of training."""
    return int(_permutation(length, seed, position // length)[position % length])


def step_positions(
    step: int, micro_batch: int, rank: int, *, batch_size: int, micro_batches: int, world_size: int
) -> range:
    """Positions of one process in one micro-batch of a global step: a contiguous range.

    `batch_size` is global, over all micro-batches and processes.
    """
    share = batch_size // (micro_batches * world_size)
    start = step * batch_size + (micro_batch * world_size + rank) * share
    return range(start, start + share)


class PositionSampler(Sampler[list[int]]):
    """An endless series of position lists, one per micro-batch of this process, starting with step `start_step`.

    Raises `InputError` when the batch does not divide.
    """

    def __init__(self, start_step: int, batch_size: int, micro_batches: int, rank: int, world_size: int) -> None:
        if batch_size < 1 or batch_size % (micro_batches * world_size):
            raise InputError(
                f"A batch of {batch_size} does not divide into {micro_batches} micro-batches on {world_size} "
                f"processes: choose a multiple of {micro_batches * world_size}."
            )
        self._start, self._rank = start_step, rank
        self._split = {"batch_size": batch_size, "micro_batches": micro_batches, "world_size": world_size}

    def __iter__(self) -> Iterator[list[int]]:
        step = self._start
        while True:
            for micro_batch in range(self._split["micro_batches"]):
                yield list(step_positions(step, micro_batch, self._rank, **self._split))
            step += 1


class _PositionDataset(Dataset):
    """Whole micro-batches by their positions; without images and tokens from position `taught` on."""

    def __init__(
        self,
        dataset: LatentDataset,
        seed: int,
        flip: bool,
        images: bool,
        teachers: Sequence[int],
        taught: float,
        extras: "Callable[[list[int]], dict[str, Tensor]] | None",
    ) -> None:
        self._dataset, self._seed, self._flip, self._extras = dataset, seed, flip, extras
        self._images, self._teachers, self._taught = images, teachers, taught

    def __getitem__(self, positions: list[int]) -> "dict[str, Tensor] | InputError":
        indices = [index_at(position, len(self._dataset), self._seed) for position in positions]
        flips = torch.zeros(len(positions), dtype=torch.bool)
        if self._flip:
            flips = keyed_uniform(self._seed, Stream.FLIP, positions) < 0.5
        try:
            taught = positions[0] < self._taught
            images, teachers = self._images and taught, self._teachers if taught else ()
            batch = self._dataset.read(indices, flips.tolist(), images, teachers)
        except InputError as error:
            return error  # see CheckedLoader
        extras = self._extras(positions) if self._extras else {}
        return {"position": torch.tensor(positions), "index": torch.tensor(indices), **batch, **extras}


class CheckedLoader(DataLoader):
    """A DataLoader that raises the `InputError`s that its data set returns instead of a batch.

    An error raised in a worker would arrive wrapped in that worker's traceback.
    """

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                raise batch
            yield batch


def training_loader(
    dataset: LatentDataset,
    *,
    batch_size: int,
    micro_batches: int = 1,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    flip: bool = False,
    images: bool = False,
    teachers: Sequence[int] = (),
    taught_steps: int | None = None,
    pin_memory: bool = False,
    extras: Callable[[list[int]], dict[str, Tensor]] | None = None,
) -> DataLoader:
    """Endless micro-batches of this process from global step `start_step` on; `batch_size` is that of a whole step.

    A micro-batch of b = batch_size / (micro_batches · world_size) samples is a dictionary: "position" (b,) and "index"
    (b,) int64, "moments" (b, 2C, h, w), "label" (b,) int64, "image" (b, 3, H, W) uint8 if `images`, and the cached
    tokens "tokens_k" (b, N, D) fp16 for each index k in `teachers`; no images or tokens after `taught_steps` steps. If
    `flip`, samples are mirrored with probability ½, keyed by their position. `extras` computes further tensors from the
    positions, in the workers. Do not pass the loader to `accelerator.prepare`, which would shuffle and split it again.

    Raises `InputError` when the batch does not divide, or the data lack mirrored latents, pictures or tokens.
    """
    sampler = PositionSampler(start_step, batch_size, micro_batches, rank, world_size)
    if flip and not dataset.has_flip:
        raise InputError("The data set holds no mirrored latents: prepare it with --flip, or train without flips.")
    if images and not dataset.has_images:
        raise InputError("The data set holds no pictures, which a teacher needs: prepare it with --images.")
    unmirrored = next((number for number in teachers if flip and not dataset.teachers[number].flip), None)
    if unmirrored is not None:
        raise InputError(
            f"The tokens of {dataset.teachers[unmirrored].name} are those of unmirrored pictures only: prepare the "
            "data with --flip, or train without flips."
        )
    taught = float("inf") if taught_steps is None else taught_steps * batch_size
    return position_loader(
        _PositionDataset(dataset, seed, flip, images, teachers, taught, extras), sampler, workers, pin_memory
    )


def position_loader(dataset: Dataset, sampler: PositionSampler, workers: int, pin_memory: bool) -> DataLoader:
    """The batches that `dataset` makes of the lists of positions of `sampler`, an `InputError` among them raised."""
    return CheckedLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
