"""ADM-style npz files: `arr_0` uint8 (N, H, W, 3) and, optionally, `arr_1` labels (N,) and `class_names`."""

import math
import os
import sys
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

from sit_atconv.classes import read_labels
from sit_atconv.data.pictures.protocol import SourceImage, SourceOptions
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import BAD_HEADER

CLASS_NAMES = "class_names"
_BLOCK = 1 << 22  # bytes read at a time


class NpzSource:
    """Pictures of an npz, as an `ImageSource`.

    A member stored uncompressed (np.savez) is memory-mapped; a compressed one is read into memory if it fits. Damage to
    memory-mapped pictures is found only by `verify`.
    """

    kind = "npz"
    lossy = False
    names = None

    def __init__(self, path: str, options: SourceOptions) -> None:
        self.path = str(path)
        images = self._open_images()
        _check_images(self.path, images, options.convert)
        self._count = len(images)
        self.labels, self.class_names = (None, None) if options.unconditional else self._read_labels()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> SourceImage:
        image = np.array(self._open_images()[index])
        image = image if image.ndim == 3 else image[..., None]
        image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
        label = None if self.labels is None else int(self.labels[index])
        return SourceImage(image, label, f"{os.path.basename(self.path)}:arr_0[{index}]")

    def verify(self) -> None:
        """Raise `InputError` if the pictures' bytes have changed since they were written; reads all, at 2 GB/s."""
        if isinstance(self._open_images(), np.memmap):  # others were verified when they were read
            read_npz_member(self.path, "arr_0")

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_images"}

    def _open_images(self) -> np.ndarray:
        if "_images" not in self.__dict__:
            self._images = read_npz_member(self.path, "arr_0", verify=False)  # as every worker opens them
        return self._images

    def _read_labels(self) -> tuple[np.ndarray | None, list[str] | None]:
        members = npz_members(self.path)
        if "arr_1" not in members:
            return None, None
        names = read_npz_member(self.path, CLASS_NAMES).tolist() if CLASS_NAMES in members else None
        values = read_npz_member(self.path, "arr_1")
        labels, names = read_labels(values, f"{self.path}: arr_1", names)
        if len(labels) != self._count:
            raise InputError(f"{self.path}: arr_1 holds {len(labels)} labels for {self._count} images.")
        return labels, names


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
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
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


def _check_images(path: str, images: np.ndarray, convert: bool) -> None:
    """Refuse everything except uint8 pictures, channels last, with values from 0 to 255."""
    expected = "Expected uint8 (N, H, W, 3) with values from 0 to 255"
    shape, grey = images.shape, images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1)
    if images.dtype != np.uint8:
        raise InputError(f"{path}: arr_0 is {images.dtype}. {expected}: scale and round the images before saving.")
    if images.ndim == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        raise InputError(f"{path}: arr_0 has shape {shape}, channels first. {expected}: transpose it to (0, 2, 3, 1).")
    if not (grey or (images.ndim == 4 and shape[3] == 3)):
        raise InputError(f"{path}: arr_0 has shape {shape}. {expected}.")
    if grey and not convert:
        raise InputError(f"{path}: arr_0 of shape {shape} is greyscale. {expected}: repeat the channel three times.")
    if 0 in shape:
        raise InputError(f"{path}: arr_0 is empty (shape {shape}).")
    if images[:: max(1, len(images) // 64)].max() <= 1:
        raise InputError(f"{path}: arr_0 holds only 0 and 1: it was cast before it was scaled. {expected}.")
