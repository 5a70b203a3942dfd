"""Digests of files, and errors that name the file."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

import numpy as np

BAD_HEADER = (ValueError, SyntaxError, TokenError)  # what numpy makes of a damaged header of an npy


def sha256_of_file(path: str | Path) -> str:
    """The sha256 of a file's contents, in hexadecimal; the file is read in blocks, so it may be large."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of an npy; the file is left at its data. Raises one of `BAD_HEADER`."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add `path` to an `OSError` that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
