"""Check every byte of a prepared data set: sizes, checksums, shapes, labels, latents and pictures."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from sit_atconv.data.manifest import Manifest, ShardInfo, load_manifest
from sit_atconv.data.shards import ShardReader
from sit_atconv.errors import InputError
from sit_atconv.files import sha256_of_file

log = logging.getLogger(__name__)
_SHOWN = 20


def verify_dataset(directory: str) -> None:
    """Raise `InputError` that names every fault found in a prepared directory, by file and row."""
    root, manifest = Path(directory), load_manifest(directory)
    if not manifest.complete:
        raise InputError(f"{directory} is not complete: run its preparation again to finish it.")
    faults = [] if sum(shard.count for shard in manifest.shards) == manifest.count else ["dataset.json: counts differ"]
    for shard in tqdm(manifest.shards, unit="shard", desc="verifying"):
        faults += [f"{root / shard.name}{fault}" for fault in _shard_faults(root / shard.name, shard, manifest)]
    if faults:
        more = f"\n… and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        listed = "\n".join(faults[:_SHOWN])
        raise InputError(
            f"{len(faults)} fault(s) in {directory}:\n{listed}{more}\nCopy those files again, or prepare anew."
        )
    log.info("%s: %d shards, %d samples, no fault.", directory, len(manifest.shards), manifest.count)


def _shard_faults(path: Path, info: ShardInfo, manifest: Manifest) -> Iterator[str]:
    if not path.is_file():
        yield ": missing"
        return
    if path.stat().st_size != info.bytes:
        yield f": {path.stat().st_size:,} bytes instead of {info.bytes:,} (truncated?)"
        return
    if sha256_of_file(path) != info.sha256:
        yield ": the checksum differs, so bytes have changed since it was written"
    try:
        reader = ShardReader(path, info.count, manifest.row_shapes, manifest.has_images)
    except InputError as error:
        yield f": {error}"
        return
    if (reader.index.diff() <= 0).any():
        yield ": positions in the source are not in order"
    for row in range(info.count):
        yield from _row_faults(reader, row, manifest)


def _row_faults(reader: ShardReader, row: int, manifest: Manifest) -> Iterator[str]:
    label = int(reader.labels[row])
    if manifest.num_classes and not 0 <= label < manifest.num_classes:
        yield f" row {row}: label {label} is outside 0…{manifest.num_classes - 1}"
    for name in manifest.row_shapes:
        if not torch.isfinite(reader.row(name, row)).all():
            yield f" row {row}: {name} holds NaN or infinity"
    if manifest.has_images:
        try:
            shape = reader.image(row).shape
        except InputError as error:
            yield f" row {row}: {error}"
            return
        if shape != (*manifest.resolution, 3):
            yield f" row {row}: the picture is {shape}, not {(*manifest.resolution, 3)}"
