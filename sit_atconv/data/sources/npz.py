"""Pictures in npz files: `arr_0` uint8 (N, H, W, 3) and, optionally, `arr_1` labels (N,) and `class_names`, as in ADM,
or under other names (`keys`)."""

import math
import os
import sys
import zipfile
import zlib
from functools import partial
from typing import BinaryIO

import numpy as np

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources.arrays import Arrays, ArraySource, arrays_of_rows
from sit_atconv.data.sources.keys import ROWS, find_keys
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import BAD_HEADER, read_npy_header

CLASS_NAMES = "class_names"
_BLOCK = 1 << 22  # bytes read at a time


class NpzSource(ArraySource):
    """Pictures of an npz, as an `ImageSource`.

    A member stored uncompressed (np.savez) is memory-mapped; a compressed one is read into memory if it fits. Damage to
    memory-mapped pictures is found only by `verify`.
    """

    def __init__(self, path: str, options: SourceOptions, part: str | None = None) -> None:
        super().__init__("npz", path, partial(_load, str(path), options, part), options)

    def verify(self) -> None:
        """Raise `InputError` if the pictures' bytes have changed since they were written; reads all, at 2 GB/s."""
        if isinstance(self._open_images(), np.memmap):  # others were verified when they were read
            read_npz_member(self.path, self.image_key)


def _load(path: str, options: SourceOptions, part: str | None) -> Arrays:
    members = npz_members(path)
    image_key, label_key = find_keys(path, members, options, part)
    images = read_npz_member(path, image_key, verify=False)  # as every worker opens them
    labels = names = None
    if label_key is not None and not options.unconditional:
        labels = read_npz_member(path, label_key)
        names = read_npz_member(path, CLASS_NAMES).tolist() if CLASS_NAMES in members else None
    if images.ndim == 2 and image_key == ROWS:
        images, labels = arrays_of_rows(images, labels, f"{path}: {image_key}")
    return Arrays(images, image_key, labels, label_key or "", names)


def npz_members(path: str) -> list[str]:
    """Names of the arrays in an npz, without reading them."""
    with _open_zip(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_npz_member(path: str, name: str, verify: bool = True) -> np.ndarray:
    """One array of an npz: memory-mapped if stored uncompressed, else read.

    `verify=False` maps without comparing the bytes with the archive's CRC-32, which would read them all. Raises
    `InputError` when the member is missing, pickled, truncated, damaged or larger than memory.
    """
    with _open_zip(path) as archive:
        try:
            info = archive.getinfo(f"{name}.npy")
        except KeyError:
            found = ", ".join(archive.namelist()[:6]) or "nothing"
            raise InputError(f"{path} has no array '{name}' (it holds {found}).") from None
        try:
            with archive.open(info) as member:
                shape, fortran, dtype = _read_header(member, path, name)
                header = member.tell()
                nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
                if header + nbytes != info.file_size:
                    raise InputError(
                        f"{path}: '{name}' declares {dtype} {shape}, {nbytes:,} bytes, but {info.file_size - header:,} "
                        "follow. The file is damaged or truncated."
                    )
                if info.compress_type != zipfile.ZIP_STORED:
                    _require_memory(path, name, nbytes)
                    data = np.frombuffer(member.read(nbytes), dtype=dtype, count=nbytes // dtype.itemsize)
                    return data.reshape(shape, order="F" if fortran else "C")
                while verify and member.read(_BLOCK):  # zipfile compares the CRC-32 at the end
                    pass
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise InputError(f"{path} is damaged: cannot read '{name}': {error}. Fetch or write it again.") from error
        except (OSError, NotImplementedError, RuntimeError) as error:  # RuntimeError: it is encrypted
            raise InputError(f"{path}: cannot read '{name}': {error}.") from error
    if nbytes == 0:
        return np.empty(shape, dtype)
    offset = _data_offset(path, info) + header
    if offset + nbytes > os.path.getsize(path):
        raise InputError(f"{path} is truncated: '{name}' should reach byte {offset + nbytes:,}.")
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def _open_zip(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise InputError(
            f"Cannot open {path} as an npz: {error}. Is it complete, and written by numpy.savez?"
        ) from error


def _read_header(member: BinaryIO, path: str, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of an npy stream, leaving it at the first byte of data."""
    try:
        shape, fortran, dtype = read_npy_header(member)
    except BAD_HEADER as error:
        raise InputError(f"{path}: '{name}' is not a numpy array: {error}.") from error
    if not 0 < dtype.itemsize * math.prod(max(1, side) for side in shape) <= sys.maxsize or min(shape, default=0) < 0:
        raise InputError(f"{path}: '{name}' is {dtype} of shape {shape}, which is not a possible array.")
    if dtype.hasobject:
        raise InputError(
            f"{path}: '{name}' holds pickled Python objects, which may run code when read. Save plain arrays."
        )
    return shape, fortran, dtype


def _data_offset(path: str, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header (30 bytes, the name and the extra field)."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths = file.read(4)
    return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _require_memory(path: str, name: str, nbytes: int) -> None:
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes > available:
        raise InputError(
            f"{path}: compressed '{name}' needs {nbytes / 2**30:.1f} GiB, this machine has {available / 2**30:.1f}. "
            "Write it with numpy.savez (uncompressed): then it is read from disk as needed."
        )
