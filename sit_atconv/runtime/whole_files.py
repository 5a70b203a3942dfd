"""Files and folders that are there whole or not at all: the one way in which anything is written that is read again.

They are filled beside their place, forced to disk and renamed, so that readers see all of it or what was there before,
after a kill or a power cut too.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from sit_atconv.errors import FULL_DISK, InputError

UNFINISHED = ".unfinished-"  # how the names of files and folders begin that are not whole yet
_LEFTOVERS = (f"{UNFINISHED}*", ".*.partial", "settings.unfinished")  # the last two of earlier versions
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # what some file systems, or modes, say of a directory


def write_json(path: str | Path, values: Any) -> None:
    """Write a JSON file, whole or not at all. What JSON does not know, such as a path, is written as text."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False, default=str) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as file:
        # What is no UTF-8 in a file's name becomes an escape that JSON undoes.
        file.write(text.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to fill, which becomes `path` at the end of the context; after a failure, `path` is as it was.

    The target of a link is replaced, the link stays. A device, a pipe or this program's own output (/dev/stdout) is
    written into. An `OSError`, also that of a full disk, names `path`.
    """
    try:
        with _open_stream(path) if _is_stream(path) else _replacement(path) as file:
            yield file
    except OSError as error:
        if error.errno in FULL_DISK or UNFINISHED in str(error.filename):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` at the end of the context; after a failure, there is none.

    Files get the mode that the umask gives, whatever the library chose that wrote them: safetensors makes them 0600.
    The folder around it is there. Raises `InputError` when something is at `path` already, but for an empty folder.
    """
    require_free(path)
    final = Path(os.path.realpath(path))
    unfinished = final.with_name(UNFINISHED + final.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        apply_umask(unfinished)
        for written in [*unfinished.rglob("*"), unfinished]:
            _sync(written)
        unfinished.rename(final)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, SafetensorError) and (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    _sync(final.parent)


def apply_umask(folder: Path, pattern: str = "*") -> None:
    """Give the files in and below a folder the mode of new files: what the umask has left of their folders' mode."""
    for path in folder.rglob(pattern):
        if path.is_file():
            path.chmod(path.parent.stat().st_mode & 0o666)


def point_link(link: Path, target: str) -> None:
    """Let a symbolic link, new or old, name `target`; at no moment is there none."""
    unfinished = link.with_name(UNFINISHED + link.name)
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(target)
    unfinished.replace(link)
    _sync(link.parent)


def leftovers(folder: Path) -> list[Path]:
    """What a killed program, of this or an earlier version, did not finish writing in a folder and those in it."""
    return [path for pattern in _LEFTOVERS for at in (pattern, f"*/{pattern}") for path in folder.glob(at)]


def remove_leftovers(folder: Path) -> None:
    """Remove the `leftovers` of a folder that nobody writes into."""
    for path in leftovers(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # two patterns, or a folder that went before, may name it


def require_free(path: Path) -> None:
    """Raise `InputError` when something is at `path` already, but for an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists already: choose another directory, or remove it first.")


def make_folder_of(path: str | Path) -> None:
    """Make the folder that the file `path` is to be written to. Raises `InputError` where there can be no such file."""
    expected = "give the name of a file in a folder that you may write to."
    final = Path(path if _is_stream(path) else os.path.realpath(path))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"Cannot write {path}: {final.parent} is not a folder; {expected}") from error
    if final.is_dir() or not os.access(final if _is_stream(final) else final.parent, os.W_OK):
        raise InputError(f"Cannot write {path}: {expected}")


@contextlib.contextmanager
def _replacement(path: str | Path) -> Iterator[IO[bytes]]:
    final = Path(os.path.realpath(path))
    unfinished = final.with_name(f"{UNFINISHED}{final.name}.partial")  # no search for *.safetensors or *.png finds it
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(final)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync(final.parent)


def _is_stream(path: str | Path) -> bool:
    """Whether there is something at `path` that is written into, not replaced."""
    with contextlib.suppress(OSError):
        there = os.stat(path)
        return not (stat.S_ISREG(there.st_mode) or stat.S_ISDIR(there.st_mode)) or _own_output(there) is not None
    return False


def _open_stream(path: str | Path) -> IO[bytes]:
    own = _own_output(os.stat(path))
    return open(path, "wb") if own is None else os.fdopen(os.dup(own), "wb")  # opened anew, it would be truncated


def _own_output(there: os.stat_result) -> int | None:
    """The descriptor of this program's standard output or error, if that is where they go."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            if os.path.samestat(there, os.fstat(descriptor)):
                return descriptor
    return None


def _sync(path: Path) -> None:
    """Force a file, or a directory's entries, to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
