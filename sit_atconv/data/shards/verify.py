"""Check every byte of a prepared data set: sizes, checksums, shapes, labels, latents, tokens and pictures."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sit_atconv.data.remote.storage import is_remote
from sit_atconv.data.repa import RepaDataset, is_repa
from sit_atconv.data.shards.copy import copy_dataset
from sit_atconv.data.shards.format import ShardReader
from sit_atconv.data.shards.manifest import MANIFEST_NAME, Manifest, Row, ShardInfo, load_manifest
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import sha256_of_file
from sit_atconv.runtime.processes import end_when_unable_to_send

log = logging.getLogger(__name__)
_SHOWN, _ROWS_AT_A_TIME = 20, 64


def verify_dataset(directory: str, workers: int = 0) -> None:
    """Check data prepared by us, in a directory or fetched from an address, or a directory prepared for REPA.

    Raises `InputError` that lists the faults by file and row.

    A directory prepared for REPA has no checksums: its files are read, by `workers` processes.
    """
    if is_repa(directory) and not (Path(directory) / MANIFEST_NAME).exists():
        dataset = RepaDataset(directory)
        _raise(directory, list(_repa_faults(dataset, directory, workers)))
        pictures = "and pictures" if dataset.has_images else "without pictures"
        log.info("%s: %d latents %s, no fault (there are no checksums).", directory, len(dataset), pictures)
        return
    copy = copy_dataset(directory) if is_remote(directory) else None
    root = copy.path if copy else Path(directory)
    manifest = load_manifest(root)
    if not manifest.complete:
        raise InputError(f"{directory} is not complete: run its preparation again to finish it.")
    faults = [] if sum(shard.count for shard in manifest.shards) == manifest.count else ["dataset.json: counts differ"]
    for number in tqdm(range(len(manifest.shards)), unit="shard", desc="verifying"):
        faults += _shard_faults(root, number, manifest)
    _raise(directory, faults)
    log.info("%s: %d shards, %d samples, no fault.", directory, len(manifest.shards), manifest.count)


def _raise(directory: str, faults: list[str]) -> None:
    if not faults:
        return
    more = f"\n… and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    listed = "\n".join(faults[:_SHOWN])
    raise InputError(
        f"{len(faults)} fault(s) in {directory}:\n{listed}{more}\nCopy those files again, or prepare anew."
    )


def _shard_faults(root: Path, number: int, manifest: Manifest) -> Iterator[str]:
    """Faults of a shard, and of the token files beside it."""
    shard = None
    for part, (files, rows) in enumerate(manifest.series):
        info, images = files[number], manifest.has_images and part == 0
        path = root / info.name
        incomplete = _incomplete(path, info)
        if incomplete is not None:
            yield f"{path}: {incomplete}"
            continue
        if sha256_of_file(path) != info.sha256:
            yield f"{path}: the checksum differs, so bytes have changed since it was written"
        try:
            reader = ShardReader(path, info.count, rows, images)
        except InputError as error:
            yield f"{path}: {error}"
            continue
        yield from (f"{path}{fault}" for fault in _content_faults(reader, rows, manifest, images, shard))
        shard = reader if part == 0 else shard


def _incomplete(path: Path, info: ShardInfo) -> str | None:
    """Why a file cannot be complete; None if it has the expected size."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    return None if size == info.bytes else f"{size:,} bytes instead of {info.bytes:,} (truncated?)"


def _content_faults(
    reader: ShardReader, rows: dict[str, Row], manifest: Manifest, images: bool, shard: ShardReader | None
) -> Iterator[str]:
    if shard is not None and not (torch.equal(reader.index, shard.index) and torch.equal(reader.labels, shard.labels)):
        yield f": holds other samples than {shard.path.name}"
    if (reader.index.diff() <= 0).any():
        yield ": positions in the source are not in order"
    for row, label in enumerate(reader.labels.tolist()):
        if manifest.num_classes and not 0 <= label < manifest.num_classes:
            yield f" row {row}: label {label} is outside 0…{manifest.num_classes - 1}"
        for name in rows:
            if not torch.isfinite(reader.row(name, row)).all():
                yield f" row {row}: {name} holds NaN or infinity"
        if images:
            yield from _picture_faults(reader, row, manifest)


def _picture_faults(reader: ShardReader, row: int, manifest: Manifest) -> Iterator[str]:
    try:
        shape = reader.image(row).shape
    except InputError as error:
        yield f" row {row}: {error}"
        return
    if shape != (*manifest.resolution, 3):
        yield f" row {row}: the picture is {shape}, not {(*manifest.resolution, 3)}"


class _RepaFaults(Dataset):
    """The faults of the samples in a range, one sentence each."""

    def __init__(self, dataset: RepaDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, rows: range) -> list[str]:
        faults = []
        for row in rows:
            try:
                self._dataset.read([row], [False], images=self._dataset.has_images)
            except InputError as error:
                faults.append(str(error))
        return faults


def _repa_faults(dataset: RepaDataset, directory: str, workers: int) -> Iterator[str]:
    yield from (f"{Path(directory) / name}: not listed in vae-sd/dataset.json" for name in dataset.unlisted())
    ranges = [
        range(start, min(start + _ROWS_AT_A_TIME, len(dataset))) for start in range(0, len(dataset), _ROWS_AT_A_TIME)
    ]
    loader = DataLoader(
        _RepaFaults(dataset),
        batch_size=None,
        sampler=ranges,
        num_workers=workers,
        worker_init_fn=end_when_unable_to_send,
    )
    for faults in tqdm(loader, unit=f"×{_ROWS_AT_A_TIME} img", desc="verifying"):
        yield from faults
