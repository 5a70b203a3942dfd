"""Atomic writing of files and folders, used for everything that is read again.

Contents are written to a temporary name in the same folder, synced to disk and renamed, so that readers see either the
complete new version or the old one, even after a kill or a power cut.
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

UNFINISHED = ".unfinished-"  # the prefix of incomplete files and folders
_LEFTOVERS = (f"{UNFINISHED}*", ".*.partial", "settings.unfinished")  # the last two are from earlier versions
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # errors of some file systems or modes for a directory
_WITHOUT_MODES = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # errors of chmod on some file systems
_LONGEST_NAME = 255  # bytes, of a file on any common file system


def write_json(path: str | Path, values: Any) -> None:
    """Write a JSON file, whole or not at all. What JSON does not know, such as a path, is written as text."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False, default=str) + "\n")


def as_json(values: Any) -> Any:
    """The values as they come back from a file of `write_json`: tuples as lists, paths as text."""
    return json.loads(json.dumps(values, default=str))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as file:
        # Bytes of a file name that are not UTF-8 become an escape that JSON parsers undo.
        file.write(text.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file that becomes `path` at the end of the context; after a failure, `path` is unchanged.

    If `path` is a link, its target is replaced. A device, a pipe or this program's own output (/dev/stdout) is written
    to directly. An `OSError`, even for a full disk, names `path`.
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
    """Create an empty folder that becomes `path` at the end of the context; after a failure, it is removed.

    Files get the mode of the umask, whatever the writing library chose: safetensors writes them as 0600. The parent
    folder must exist. Raises `InputError` when `path` exists already, unless it is an empty folder.
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
    """Give all files below a folder the mode of new files, taken from their folder's mode, to which umask applied."""
    for path in folder.rglob(pattern):
        if path.is_file():
            try:
                path.chmod(path.parent.stat().st_mode & 0o666)
            except OSError as error:
                if error.errno not in _WITHOUT_MODES:
                    raise


def point_link(link: Path, target: str) -> None:
    """Point a new or existing symbolic link to `target`, a name in the same folder, atomically.

    Where the file system has no links, a text file with the name takes its place; `followed` reads both.
    """
    unfinished = link.with_name(UNFINISHED + link.name)
    unfinished.unlink(missing_ok=True)
    try:
        unfinished.symlink_to(target)
    except OSError:  # file systems disagree on its number; any other fault, such as a full disk, comes again below
        unfinished.write_text(f"{target}\n")
        _sync(unfinished)
    unfinished.replace(link)
    _sync(link.parent)


def pointed(link: Path) -> str | None:
    """The name that `point_link` has given to `link`; None if it is neither a link nor such a file."""
    if link.is_symlink():
        return os.readlink(link)
    if not link.is_file() or link.stat().st_size > _LONGEST_NAME:
        return None
    name = link.read_bytes().decode(errors="replace").strip()
    return name if re.fullmatch(r"[\w.-]+", name) else None


def followed(path: Path) -> Path:
    """`path` without files that stand for links (`point_link`): RUN/checkpoints/latest/model -> …/step-0050000/model.

    Links proper are left to the system, and so is a path that exists or leads nowhere.
    """
    for link in [] if path.is_dir() else [path, *path.parents]:
        if link.is_file() and (name := pointed(link)) is not None and (link.parent / name).is_dir():
            return link.parent / name / path.relative_to(link)
    return path


def leftovers(folder: Path) -> list[Path]:
    """Incomplete files of killed programs, of this or an earlier version, in a folder and its subfolders."""
    return [path for pattern in _LEFTOVERS for at in (pattern, f"*/{pattern}") for path in folder.glob(at)]


def remove_leftovers(folder: Path) -> None:
    """Remove the `leftovers` of a folder that no program is writing into."""
    for path in leftovers(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may match twice, or be gone with its folder


def require_free(path: Path) -> None:
    """Raise `InputError` when `path` exists already, unless it is an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists already: choose another directory, or remove it first.")


def make_folder_of(path: str | Path) -> None:
    """Create the folder of the file `path`. Raises `InputError` when the file could not be written there."""
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
    unfinished = final.with_name(f"{UNFINISHED}{final.name}.partial")  # not matched by *.safetensors or *.png
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
    """Whether `path` is written to directly instead of being replaced."""
    with contextlib.suppress(OSError):
        there = os.stat(path)
        return not (stat.S_ISREG(there.st_mode) or stat.S_ISDIR(there.st_mode)) or _own_output(there) is not None
    return False


def _open_stream(path: str | Path) -> IO[bytes]:
    own = _own_output(os.stat(path))
    return open(path, "wb") if own is None else os.fdopen(os.dup(own), "wb")  # opening it again would truncate it


def _own_output(there: os.stat_result) -> int | None:
    """The descriptor of this program's standard output or error, if that is the file `there`."""
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
