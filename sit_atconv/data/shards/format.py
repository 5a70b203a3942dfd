"""Shards: safetensors files of up to 4,096 samples, written whole and read row by row through a memory map.

Tensors of a shard with n samples:
    moments        (n, 2C, h, w) fp16   posterior mean and standard deviation; fp32 when imported
    moments_flip   (n, 2C, h, w) fp16   of the mirrored pictures (optional)
    tokens_0, …    (n, N, D) fp16       one per teacher, and tokens_0_flip of the mirrored pictures (optional)
    labels         (n,) int64           -1 without labels
    index          (n,) int64           position in the sorted source
    images         (bytes,) uint8       the cropped pictures as concatenated PNG files (optional)
    image_offsets  (n + 1,) int64       where each PNG file begins, and the end

Tokens of a teacher that was added to complete data are in a file beside each shard, which repeats labels and index.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sit_atconv.data.pictures.decode import UNDECODABLE
from sit_atconv.data.shards.manifest import Row, ShardInfo
from sit_atconv.errors import InputError
from sit_atconv.runtime.whole_files import whole_file


def shard_name(number: int, part: str = "") -> str:
    """File name of a shard, or of a `part` kept beside it; sorted like its number."""
    return f"shard-{number:05d}{part and '.'}{part}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor]) -> ShardInfo:
    """Write a shard whole or not at all; equal tensors make equal bytes."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    with whole_file(path) as file:
        file.write(data)
    return ShardInfo(path.name, len(tensors["labels"]), len(data), hashlib.sha256(data).hexdigest())


def encode_png(image: np.ndarray) -> bytes:
    """A picture uint8 (H, W, 3) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def pack_images(pngs: list[bytes]) -> dict[str, Tensor]:
    """PNG files as the tensors `images` and `image_offsets` of a shard."""
    joined = torch.frombuffer(bytearray(b"".join(pngs)), dtype=torch.uint8) if pngs else torch.empty(0).byte()
    offsets = np.cumsum([0, *map(len, pngs)])
    return {"images": joined, "image_offsets": torch.from_numpy(offsets).long()}


def join_images(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate several results of `pack_images`."""
    starts = np.cumsum([0, *(len(part["images"]) for part in parts)]).tolist()
    offsets = [part["image_offsets"][:-1] + start for part, start in zip(parts, starts, strict=False)]
    return {
        "images": torch.cat([part["images"] for part in parts]),
        "image_offsets": torch.cat([*offsets, torch.tensor(starts[-1:])]),
    }


class ShardReader:
    """A shard opened for reading rows. Tensors are views of the file's memory map: nothing is read until it is used.

    `rows` are those of its manifest; `images` says whether it must hold pictures. Raises `InputError` naming the file
    when it is missing, truncated or holds other tensors than expected.
    """

    def __init__(self, path: Path, count: int, rows: dict[str, Row], images: bool) -> None:
        self.path = path
        expected = {name: (row.dtype, (count, *row.shape)) for name, row in rows.items()}
        expected |= {"labels": (torch.int64, (count,)), "index": (torch.int64, (count,))}
        expected |= {"images": (torch.uint8, None), "image_offsets": (torch.int64, (count + 1,))} if images else {}
        self._tensors = _map_tensors(path)
        for name, (dtype, shape) in expected.items():
            tensor = self._tensors.get(name)
            if tensor is None or tensor.dtype != dtype or (shape is not None and tensor.shape != shape):
                found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
                raise InputError(f"{path}: '{name}' is {found}, expected {dtype} {shape}. Prepare the data set again.")
        self.labels, self.index = self._tensors["labels"], self._tensors["index"]

    def row(self, name: str, row: int) -> Tensor:
        """A view of a row of the tensor called `name`."""
        return self._tensors[name][row]

    def image(self, row: int) -> np.ndarray:
        """The picture of a row, uint8 (H, W, 3)."""
        start, stop = self._tensors["image_offsets"][row : row + 2].tolist()
        try:
            data = self._tensors["images"][start:stop].numpy().tobytes()
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                return np.array(picture)
        except UNDECODABLE as error:
            raise InputError(f"{self.path} row {row}: the picture is damaged ({error}).") from error


def _map_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"Cannot read shard {path}: {error}. Prepare the data set again.") from error
