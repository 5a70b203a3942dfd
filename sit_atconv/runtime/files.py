"""Facts about files."""

import hashlib
from pathlib import Path


def sha256_of_file(path: str | Path) -> str:
    """The sha256 of a file's contents, in hexadecimal; read in blocks, so that size does not matter."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
