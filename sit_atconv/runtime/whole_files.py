"""Files that are there whole or not at all, and JSON in them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from sit_atconv.errors import FULL_DISK, InputError


def write_json(path: Path, values: dict) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    # What is no UTF-8 in a file's name becomes an escape that JSON undoes.
    write_whole(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, then rename: readers see all of it or nothing.

    A failed write leaves nothing behind; a full disk is an `InputError`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise InputError(
                f"No space left while writing {path}; the partial file was removed, complete ones are kept. Make room "
                "and run the same command again."
            ) from error
        raise
