"""Where results go: files whose folders are made for them, and a terminal whose reader may have gone."""

import os
import sys
from pathlib import Path

from sit_atconv.errors import InputError


def make_folder_of(path: str | Path) -> None:
    """Make the folder that the file `path` is to be written to. Raises `InputError` where there can be no such file."""
    path = Path(path)
    expected = "give the name of a file in a folder that you may write to."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"Cannot write {path}: {path.parent} is not a folder; {expected}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"Cannot write {path}: {expected}")


def show(text: str) -> None:
    """Write to the terminal. A reader that has gone, as `head` does, is no mistake."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # what is left would fail once more when Python flushes it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
