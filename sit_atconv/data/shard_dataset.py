"""Latents read from the shards of a prepared directory."""

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sit_atconv.alignment.cached import tokens_name
from sit_atconv.autoencoder import IDENTITY
from sit_atconv.data.latents import LatentDataset
from sit_atconv.data.manifest import ShardInfo, load_manifest
from sit_atconv.data.shards import ShardReader
from sit_atconv.errors import InputError


class ShardDataset(LatentDataset):
    """A directory written by `sit_atconv.data.prepare`. Sizes are checked when it is opened, contents when read."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        manifest = load_manifest(directory)
        if not manifest.complete:
            raise InputError(f"{directory} is not complete: run its preparation again to finish it.")
        _check_sizes(self._directory, manifest.shards)
        self._shards, self._stored_flip = manifest.shards, manifest.has_flip
        self._row_shapes, self.teachers = manifest.row_shapes, tuple(manifest.teachers)
        self._ends = list(itertools.accumulate(shard.count for shard in manifest.shards))
        self._readers: dict[int, ShardReader] = {}
        self.latents, self.latent_shape = manifest.latents, manifest.latent_shape
        self.num_classes, self.class_names = manifest.num_classes, manifest.class_names
        # Latents that are pixels are mirrored as they are read, and are their own pictures.
        self._is_pixels = manifest.latents.autoencoder == IDENTITY
        self._stored_images = manifest.has_images
        self.has_flip, self.has_images = manifest.has_flip or self._is_pixels, manifest.has_images or self._is_pixels

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, index: int) -> str:
        shard, row = self._locate(index)
        return f"{self._directory / self._shards[shard].name} row {row}"

    def source_index(self, index: int) -> int:
        """Position of a sample in the sorted source that it was prepared from."""
        shard, row = self._locate(index)
        return int(self._reader(shard).index[row])

    def labels(self) -> np.ndarray:
        """All labels, int64 (len,), without reading latents."""
        parts = [self._reader(shard).labels for shard, info in enumerate(self._shards) if info.count]
        return torch.cat(parts).numpy()

    def _moments(self, indices: Sequence[int], flips: Sequence[bool]) -> Tensor:
        moments = self._rows("moments", indices, flips if self._stored_flip else [False] * len(flips))
        if self._is_pixels and any(flips):
            mirrored = torch.as_tensor(flips)
            moments[mirrored] = moments[mirrored].flip(-1)
        return moments

    def _tokens(self, number: int, indices: Sequence[int], flips: Sequence[bool]) -> Tensor:
        return self._rows(tokens_name(number), indices, flips)

    def _rows(self, name: str, indices: Sequence[int], flips: Sequence[bool]) -> Tensor:
        """Rows of a stored tensor or, where `flips` says so, of its mirrored version: (n, …) fp16, copied once."""
        rows = torch.empty(len(indices), *self._row_shapes[name], dtype=torch.float16)
        for out, index, flip in zip(rows, indices, flips, strict=True):
            shard, row = self._locate(index)
            out.copy_(self._reader(shard).row(f"{name}_flip" if flip else name, row))
        return rows

    def _labels(self, indices: Sequence[int]) -> Tensor:
        located = [self._locate(index) for index in indices]
        return torch.tensor([int(self._reader(shard).labels[row]) for shard, row in located], dtype=torch.int64)

    def _image(self, index: int) -> np.ndarray:
        shard, row = self._locate(index)
        return self._reader(shard).image(row)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - self._ends[shard] + self._shards[shard].count

    def _reader(self, shard: int) -> ShardReader:
        if shard not in self._readers:
            info = self._shards[shard]
            path = self._directory / info.name
            self._readers[shard] = ShardReader(path, info.count, self._row_shapes, self._stored_images)
        return self._readers[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_readers": {}}


def _check_sizes(directory: Path, shards: Sequence[ShardInfo]) -> None:
    for shard in shards:
        path = directory / shard.name
        if not path.is_file():
            raise InputError(f"{path} is missing: copy the data set again, or run its preparation again.")
        size = path.stat().st_size
        if size != shard.bytes:
            raise InputError(f"{path} is {size:,} bytes, not {shard.bytes:,}: it is truncated. Copy it again.")
    if sum(shard.count for shard in shards) == 0:
        raise InputError(f"{directory} holds no samples.")
