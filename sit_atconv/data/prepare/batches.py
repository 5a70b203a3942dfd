"""Batches of pictures for preparation, each from a single shard, decoded by data loader workers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sit_atconv.data.latents import LatentDataset
from sit_atconv.data.pictures.crop import center_crop
from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.data.pictures.remarks import Remarks
from sit_atconv.data.shards.dataset import ShardDataset
from sit_atconv.data.shards.format import encode_png, pack_images
from sit_atconv.data.shards.manifest import Manifest, SkippedImage, versions
from sit_atconv.errors import InputError

Key = tuple[int, int, int]  # shard number, first position of a batch, one past its last position


@dataclass
class PictureBatch:
    """Samples of one shard.

    `images` (n, H, W, 3) uint8 is empty unless an encoder needs them; `packed` holds their PNG files if they are kept;
    `encoded` holds tensors that need not be computed, by their names in the shard.

    Workers send all large data as tensors, in shared memory: through a pipe, a worker that outlives its killed parent
    would hang when the pipe is full.
    """

    shard: int
    images: Tensor
    index: list[int]
    labels: list[int]
    packed: dict[str, Tensor] = field(default_factory=dict)
    encoded: dict[str, Tensor] = field(default_factory=dict)
    skipped: list[SkippedImage] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)


class SourceBatches(Dataset):
    """Pictures of a source, cropped."""

    def __init__(self, source: ImageSource, manifest: Manifest) -> None:
        self._source, self._manifest = source, manifest

    def __getitem__(self, key: Key) -> PictureBatch:
        shard, start, stop = key
        batch, crops = _begin(shard, self._manifest), []
        for index in range(start, stop):
            try:
                picture = self._source[index]
            except InputError as error:
                batch.skipped.append(SkippedImage(index, str(error)))
                continue
            batch.remarks += Remarks.of([picture])
            crops.append(center_crop(picture.image, *self._manifest.resolution))
            batch.index.append(index)
            batch.labels.append(-1 if picture.label is None or not self._manifest.num_classes else picture.label)
        return _with_pictures(batch, crops, self._manifest.has_images)


class LatentBatches(Dataset):
    """Latents that are taken over as they are, with their pictures if these are kept or a teacher needs them."""

    def __init__(self, dataset: LatentDataset, manifest: Manifest) -> None:
        self._dataset, self._manifest = dataset, manifest
        self._pictures = manifest.has_images or bool(manifest.teachers)

    def __getitem__(self, key: Key) -> PictureBatch:
        shard, start, stop = key
        batch, moments, crops = _begin(shard, self._manifest), [], []
        kinds = versions("moments", self._manifest.has_flip)
        for index in range(start, stop):
            try:
                sample = self._dataset.read([index], [False], images=self._pictures)
                mirrored = [self._dataset.read([index], [True])["moments"]] if self._manifest.has_flip else []
            except InputError as error:
                batch.skipped.append(SkippedImage(index, str(error)))
                continue
            moments.append([sample["moments"], *mirrored])
            if self._pictures:
                crops.append(sample["image"][0].permute(1, 2, 0).numpy())
            batch.index.append(index)
            batch.labels.append(int(sample["label"]) if self._manifest.num_classes else -1)
        batch.encoded = {kind: torch.cat(rows) for kind, rows in zip(kinds, zip(*moments, strict=True), strict=False)}
        return _with_pictures(batch, crops, self._manifest.has_images)


class StoredBatches(Dataset):
    """Pictures of data that are already prepared, by their rows."""

    def __init__(self, dataset: ShardDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, key: Key) -> PictureBatch:
        shard, start, stop = key
        rows = range(start, stop)
        read = self._dataset.read(rows, [False] * len(rows), images=True)
        index = [self._dataset.source_index(row) for row in rows]
        return PictureBatch(shard, read["image"].permute(0, 2, 3, 1), index, read["label"].tolist())


def _begin(shard: int, manifest: Manifest) -> PictureBatch:
    return PictureBatch(shard, torch.empty(0, *manifest.resolution, 3, dtype=torch.uint8), [], [])


def _with_pictures(batch: PictureBatch, crops: Sequence[np.ndarray], keep: bool) -> PictureBatch:
    if crops:
        batch.images = torch.from_numpy(np.stack(crops))
    if keep:
        batch.packed = pack_images([encode_png(crop) for crop in crops])
    return batch
