"""Latents read from the shards of a prepared directory."""

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sit_atconv.alignment.cached import tokens_name
from sit_atconv.autoencoder import IDENTITY
from sit_atconv.data.latents import LatentDataset, empty_batch
from sit_atconv.data.remote.storage import is_remote
from sit_atconv.data.shards.copy import copy_dataset
from sit_atconv.data.shards.format import ShardReader
from sit_atconv.data.shards.manifest import ShardInfo, load_manifest
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import sha256_of_file

_HASHING_THREADS = 4  # one file each; hashing releases Python's global lock


class ShardDataset(LatentDataset):
    """A directory written by `sit_atconv.data.prepare`, or a copy of the one at an address (`copy_dataset`).

    Sizes are checked when it is opened, contents when read.
    """

    def __init__(self, directory: str) -> None:
        self._copy = copy_dataset(directory) if is_remote(directory) else None  # stays while this object lives
        self._directory = self._copy.path if self._copy else Path(directory)
        manifest = load_manifest(self._directory)
        if not manifest.complete:
            raise InputError(f"{directory} is not complete: run its preparation again to finish it.")
        for files, _ in manifest.series:
            _check_sizes(self._directory, files)
        self._series, self._stored_flip = manifest.series, manifest.has_flip
        self._shards, self.teachers = manifest.shards, tuple(manifest.teachers)
        self._row_of = {name: (part, row) for part, (_, rows) in enumerate(self._series) for name, row in rows.items()}
        self._ends = list(itertools.accumulate(shard.count for shard in manifest.shards))
        self._readers: dict[tuple[int, int], ShardReader] = {}
        self.latents, self.latent_shape = manifest.latents, manifest.latent_shape
        self.num_classes, self.class_names = manifest.num_classes, manifest.class_names
        self.empty_classes = manifest.empty_classes
        # Latents that are pixels are mirrored when they are read, and are their own pictures.
        self._is_pixels = manifest.latents.autoencoder == IDENTITY
        self._stored_images = manifest.has_images
        self.has_flip, self.has_images = manifest.has_flip or self._is_pixels, manifest.has_images or self._is_pixels

    def __len__(self) -> int:
        return self._ends[-1]

    def fingerprint(self, teachers: Sequence[int] = ()) -> str:
        used = {part for number in teachers for part, _ in [self._row_of[tokens_name(number)]]} | {0}
        content = {
            "latents": self.latents.to_dict(),
            "classes": self.num_classes,
            "files": [[[file.count, file.sha256] for file in self._series[part][0]] for part in sorted(used)],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def damaged(self, process: int = 0, processes: int = 1, rows: range | None = None) -> list[str]:
        shards = range(len(self._shards))
        if rows is not None:
            shards = sorted({self._locate(row)[0] for row in rows})
        files = [infos[shard] for infos, _ in self._series for shard in shards][process::processes]
        paths = [self._directory / info.name for info in files]
        bar = tqdm(total=sum(info.bytes for info in files), unit="B", unit_scale=True, desc="comparing with digests")
        faults = []
        with bar, ThreadPoolExecutor(_HASHING_THREADS) as pool:
            for path, info, found in zip(paths, files, pool.map(sha256_of_file, paths), strict=True):
                if found != info.sha256:
                    cure = " Remove it, and it is fetched again." if self._copy else ""
                    faults.append(f"{path}: the checksum differs, so bytes have changed since it was written.{cure}")
                bar.update(info.bytes)
        return faults

    def where(self, index: int) -> str:
        shard, row = self._locate(index)
        return f"{self._directory / self._shards[shard].name} row {row}"

    def shard_range(self, number: int) -> range:
        """The samples that a shard holds."""
        return range(self._ends[number] - self._shards[number].count, self._ends[number])

    def source_index(self, index: int) -> int:
        """Position of a sample in the sorted source from which it was prepared."""
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
        """Rows (n, …) of a stored tensor, or of its mirrored version where `flips` says so, copied once."""
        part, (dtype, shape) = self._row_of[name]
        rows = empty_batch((len(indices), *shape), dtype)
        for out, index, flip in zip(rows, indices, flips, strict=True):
            shard, row = self._locate(index)
            out.copy_(self._reader(shard, part).row(f"{name}_flip" if flip else name, row))
        return rows

    def _labels(self, indices: Sequence[int]) -> Tensor:
        indices = np.asarray(indices)
        shards = np.searchsorted(self._ends, indices, side="right")
        labels, order = np.empty(len(indices), np.int64), np.argsort(shards, kind="stable")
        found, first = np.unique(shards[order], return_index=True)
        for shard, here in zip(found.tolist(), np.split(order, first[1:]), strict=False):  # one empty part of none
            labels[here] = self._reader(shard).labels.numpy()[indices[here] - self.shard_range(shard).start]
        return torch.from_numpy(labels)

    def _image(self, index: int) -> np.ndarray:
        shard, row = self._locate(index)
        return self._reader(shard).image(row)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - self._ends[shard] + self._shards[shard].count

    def _reader(self, shard: int, part: int = 0) -> ShardReader:
        """The reader of a shard or, for `part` > 0, of a file beside it (see `Manifest.series`)."""
        if (shard, part) not in self._readers:
            files, rows = self._series[part]
            path, images = self._directory / files[shard].name, self._stored_images and part == 0
            self._readers[shard, part] = ShardReader(path, files[shard].count, rows, images)
        return self._readers[shard, part]

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
