"""The work of preparation: encode batches of pictures and write this process's share of the shards."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sit_atconv.alignment import Teacher
from sit_atconv.alignment.cached import tokens_name
from sit_atconv.autoencoder import Autoencoder
from sit_atconv.data.pictures.remarks import Remarks
from sit_atconv.data.prepare.batches import PictureBatch
from sit_atconv.data.shards.files import ShardFiles
from sit_atconv.data.shards.format import join_images
from sit_atconv.data.shards.manifest import Row, versions
from sit_atconv.images import to_float
from sit_atconv.runtime.cpu import single_threaded_pool
from sit_atconv.runtime.processes import end_when_unable_to_send

_CPU_GROUP = 4


class Encoder(NamedTuple):
    """Computes the tensor `name` of a shard: `function` of pictures (n, 3, H, W) uint8, mirrored too if `flip`."""

    name: str
    function: Callable[[Tensor], Tensor]
    flip: bool


def moments_encoder(autoencoder: Autoencoder, flip: bool) -> Encoder:
    """Posterior moments (n, 2C, h, w) of pictures, kept as `moments`."""
    return Encoder("moments", lambda pixels: autoencoder.encode(to_float(pixels)), flip)


def tokens_encoder(teacher: Teacher, number: int, flip: bool) -> Encoder:
    """Teacher tokens (n, N, D), kept as `tokens_<number>`."""
    return Encoder(tokens_name(number), teacher.own_tokens, flip)


def write_shards(
    batches: Dataset,
    files: ShardFiles,
    ranges: Mapping[int, range],
    encoders: Sequence[Encoder],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    progress: bool,
) -> Remarks:
    """Write the `files` whose numbers are in `ranges`, each from the encoded samples of its range of positions.

    `batches` gives a `PictureBatch` for (number, first position, one past the last). The contents of a file depend only
    on its own range, so it is the same whichever process writes it. Returns what was noticed in the pictures.
    """
    keys = [
        (number, start, min(start + batch_size, positions.stop))
        for number, positions in ranges.items()
        for start in range(positions.start, max(positions.stop, positions.start + 1), batch_size)  # an empty range: one
    ]
    loader = DataLoader(
        batches, batch_size=None, sampler=keys, num_workers=workers, worker_init_fn=end_when_unable_to_send
    )
    total = sum(len(positions) for positions in ranges.values())
    bar = tqdm(total=total, unit="img", desc="encoding", disable=not progress, smoothing=0.05)
    remarks = Remarks()
    with bar, _grouping(device) as in_groups:
        for number, shard in itertools.groupby(loader, key=lambda batch: batch.shard):
            parts = []
            for batch in shard:
                # Copied, because each tensor that a worker sent keeps a file open until it is freed.
                batch.packed, batch.encoded = _copied(batch.packed), _copied(batch.encoded)
                batch.encoded |= _encode(in_groups, encoders, files.rows, batch)
                batch.images = batch.images.new_empty(0)  # a slice would keep their memory until the shard is written
                parts.append(batch)
                remarks += batch.remarks
                bar.update(len(batch.index) + len(batch.skipped))
            _write(files, number, parts)
    return remarks


@contextlib.contextmanager
def _grouping(device: torch.device) -> Iterator[Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]]:
    """Give a callable (function, batch) -> function(batch), whose bits do not depend on the number of processes.

    On a CPU the batch is split into small groups, which also fit the caches. Each is computed by one thread, as many at
    a time as there are threads. The last group is padded to full size, because kernels choose their order of summation
    by the group's size, and the batch size must not change the result.
    """
    if device.type != "cpu":
        yield lambda function, batch: function(batch)
        return

    def run(function: Callable[[Tensor], Tensor], group: Tensor) -> Tensor:
        padding = group[-1:].expand(_CPU_GROUP - len(group), *group.shape[1:])
        return function(torch.cat([group, padding]))[: len(group)]

    with single_threaded_pool(torch.get_num_threads()) as pool:
        yield lambda function, batch: torch.cat(list(pool.map(partial(run, function), batch.split(_CPU_GROUP))))


def _encode(
    in_groups: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
    encoders: Sequence[Encoder],
    rows: Mapping[str, Row],
    batch: PictureBatch,
) -> dict[str, Tensor]:
    if len(batch.images) == 0:
        return {}
    pictures = batch.images.permute(0, 3, 1, 2)
    encoded = {}
    for name, function, flip in encoders:
        for version, pixels in zip(versions(name, flip), (pictures, pictures.flip(-1)), strict=False):
            encoded[version] = in_groups(function, pixels).to("cpu", rows[version].dtype)
    return encoded


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _write(files: ShardFiles, number: int, parts: Sequence[PictureBatch]) -> None:
    index = [i for batch in parts for i in batch.index]
    tensors = {
        "labels": torch.tensor([label for batch in parts for label in batch.labels], dtype=torch.int64),
        "index": torch.tensor(index, dtype=torch.int64),
    }
    for name, row in files.rows.items():
        encoded = [batch.encoded[name] for batch in parts if batch.index]
        tensors[name] = torch.cat(encoded) if encoded else torch.empty(0, *row.shape, dtype=row.dtype)
    if parts[0].packed:
        tensors |= join_images([batch.packed for batch in parts])
    files.write(number, index, tensors, [skip for batch in parts for skip in batch.skipped])
