"""The work of preparation: pictures of a source -> cropped, encoded batches -> shards, one process's share of them."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sit_atconv.alignment import Teacher
from sit_atconv.alignment.cached import tokens_name
from sit_atconv.autoencoder import Autoencoder
from sit_atconv.data.crop import center_crop
from sit_atconv.data.manifest import Manifest, ShardInfo, SkippedImage, read_json, versions, write_json
from sit_atconv.data.protocol import ImageSource
from sit_atconv.data.shards import encode_png, join_images, pack_images, shard_name, write_shard
from sit_atconv.errors import InputError
from sit_atconv.images import to_float
from sit_atconv.threads import single_threaded_pool

_CPU_GROUP = 4


@dataclass
class CroppedBatch:
    """Decoded pictures of one shard: `images` (n, H, W, 3) uint8, `packed` their PNG files where they are kept.

    Bulk travels from a worker as tensors, in shared memory: a worker that outlives a killed parent would hang on a
    full pipe.
    """

    shard: int
    images: Tensor
    index: list[int]
    labels: list[int]
    packed: dict[str, Tensor]
    skipped: list[SkippedImage]


class _CroppedBatches(Dataset):
    """Batches by (shard, first position, one past the last): decoding and cropping, for DataLoader workers."""

    def __init__(self, source: ImageSource, manifest: Manifest) -> None:
        self._source, self._manifest = source, manifest

    def __getitem__(self, key: tuple[int, int, int]) -> CroppedBatch:
        shard, start, stop = key
        height, width = self._manifest.resolution
        batch = CroppedBatch(shard, torch.empty(0, height, width, 3, dtype=torch.uint8), [], [], {}, [])
        crops = []
        for index in range(start, stop):
            try:
                picture = self._source[index]
            except InputError as error:
                batch.skipped.append(SkippedImage(index, str(error)))
                continue
            crops.append(center_crop(picture.image, height, width))
            batch.index.append(index)
            batch.labels.append(-1 if picture.label is None or not self._manifest.num_classes else picture.label)
        if crops:
            batch.images = torch.from_numpy(np.stack(crops))
        if self._manifest.has_images:
            batch.packed = pack_images([encode_png(crop) for crop in crops])
        return batch


def write_shards(
    source: ImageSource,
    autoencoder: Autoencoder,
    teachers: Sequence[Teacher],
    manifest: Manifest,
    directory: Path,
    numbers: Iterable[int],
    *,
    batch_size: int,
    workers: int,
    progress: bool,
) -> None:
    """Encode and write the shards of these numbers, each with a note beside it that says it is complete.

    `teachers` are those of `manifest.teachers`, in their order.
    Shard k holds positions [k·S, (k + 1)·S) of the source, less those that cannot be decoded, so that it is the same
    whoever writes it.
    """
    ranges = {number: shard_range(manifest, number) for number in numbers}
    keys = [
        (number, start, min(start + batch_size, positions.stop))
        for number, positions in ranges.items()
        for start in range(positions.start, positions.stop, batch_size)
    ]
    batches = DataLoader(_CroppedBatches(source, manifest), batch_size=None, sampler=keys, num_workers=workers)
    total = sum(len(positions) for positions in ranges.values())
    bar = tqdm(total=total, unit="img", desc="encoding", disable=not progress, smoothing=0.05)
    with bar, _grouping(autoencoder.device) as in_groups:
        for number, shard in _by_shard(batches):
            parts = []
            for batch in shard:
                parts.append((batch, _encode(in_groups, autoencoder, teachers, manifest, batch.images)))
                bar.update(len(batch.index) + len(batch.skipped))
            _write(directory, number, manifest, parts)


def shard_range(manifest: Manifest, number: int) -> range:
    """Positions of the source that a shard covers."""
    return range(number * manifest.shard_size, min((number + 1) * manifest.shard_size, manifest.source_count))


def shard_count(manifest: Manifest) -> int:
    """How many shards the source makes."""
    return -(-manifest.source_count // manifest.shard_size)


def read_note(directory: Path, number: int) -> tuple[ShardInfo, list[SkippedImage]] | None:
    """What a complete shard's note says; None when the shard is still to be written."""
    path = _note_path(directory, number)
    if not path.is_file():
        return None
    note = read_json(path)
    info = ShardInfo(**note["shard"])
    shard = directory / info.name
    if not shard.is_file() or shard.stat().st_size != info.bytes:
        return None
    return info, [SkippedImage(**skipped) for skipped in note["skipped"]]


def remove_notes(directory: Path, numbers: Iterable[int]) -> None:
    """Remove the notes once dataset.json holds what they said."""
    for number in numbers:
        _note_path(directory, number).unlink(missing_ok=True)


def _note_path(directory: Path, number: int) -> Path:
    return (directory / shard_name(number)).with_suffix(".json")


def _by_shard(batches: Iterable[CroppedBatch]) -> Iterator[tuple[int, Iterator[CroppedBatch]]]:
    """Consecutive batches of one shard together, without holding more than one at a time."""
    return itertools.groupby(batches, key=lambda batch: batch.shard)


@contextlib.contextmanager
def _grouping(device: torch.device) -> Iterator[Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]]:
    """(function, batch) -> the function of the batch, the same bits from any number of processes.

    On a CPU, small groups are computed by one thread each, as many at a time as there are threads; small ones also stay
    in the caches.
    """
    if device.type != "cpu":
        yield lambda function, batch: function(batch)
        return
    with single_threaded_pool(torch.get_num_threads()) as pool:
        yield lambda function, batch: torch.cat(list(pool.map(function, batch.split(_CPU_GROUP))))


def _encode(
    in_groups: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
    autoencoder: Autoencoder,
    teachers: Sequence[Teacher],
    manifest: Manifest,
    images: Tensor,
) -> dict[str, Tensor]:
    """What a shard holds in fp16 of pictures (n, H, W, 3) uint8: latents and tokens, of the mirror images too."""
    if len(images) == 0:
        return {}
    pictures = images.permute(0, 3, 1, 2)

    def encode(pixels: Tensor) -> Tensor:
        return autoencoder.encode(to_float(pixels))

    work = [("moments", encode, manifest.has_flip)]
    work += [(tokens_name(k), teacher.own_tokens, manifest.teachers[k].flip) for k, teacher in enumerate(teachers)]
    encoded = {}
    for name, function, flip in work:
        for version, pixels in zip(versions(name, flip), (pictures, pictures.flip(-1)), strict=False):
            encoded[version] = in_groups(function, pixels).half().cpu()
    return encoded


def _write(directory: Path, number: int, manifest: Manifest, parts: list[tuple[CroppedBatch, dict]]) -> None:
    index = [i for batch, _ in parts for i in batch.index]
    tensors = {
        "labels": torch.tensor([label for batch, _ in parts for label in batch.labels], dtype=torch.int64),
        "index": torch.tensor(index, dtype=torch.int64),
    }
    for name, shape in manifest.row_shapes.items():
        encoded = [tensors_of[name] for _, tensors_of in parts if tensors_of]
        tensors[name] = torch.cat(encoded) if encoded else torch.empty(0, *shape).half()
        finite = torch.isfinite(tensors[name]).flatten(1).all(1)
        if not finite.all():
            picture = index[int((~finite).int().argmax())]
            raise InputError(f"The {name} of picture {picture} of {manifest.source} are NaN or too large for fp16.")
    if manifest.has_images:
        tensors |= join_images([batch.packed for batch, _ in parts])
    info = write_shard(directory / shard_name(number), tensors)
    skipped = [asdict(skip) for batch, _ in parts for skip in batch.skipped]
    write_json(_note_path(directory, number), {"shard": asdict(info), "skipped": skipped})
