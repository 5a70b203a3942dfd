"""The cache of remote data: whole files on this machine, of a limited total size, shared by all processes.

CACHE/NAME/ holds the files of one data set, or a single file. CACHE/NAME.lock holds the size of all of them; processes
that use the files share a lock on it, and its time says when one began to. When room is needed, the entries that were
not used for longest go first, and those in use stay. The locks are the operating system's: a kill releases them.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import LOCK
from sit_atconv.runtime.reading import positive_from_environment

DIRECTORY, LIMIT = "SITATCONV_CACHE", "SITATCONV_CACHE_GIB"  # environment variables
_DEFAULT_LIMIT = 200.0
_GIB = 2**30


class Entry:
    """A folder of the cache, which stays as long as this object lives, in this process or one forked from it."""

    def __init__(self, path: Path, lock: IO[bytes]) -> None:
        self.path, self._lock = path, lock

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Let one process at a time add files."""
        with (self.path / LOCK).open("ab") as file:
            _lock(file, fcntl.LOCK_EX)
            yield

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lock": None}


def cache_directory() -> Path:
    """Where the cache is: SITATCONV_CACHE, else sit-atconv in the user's folder of caches."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(DIRECTORY) or base / "sit-atconv")


def use_entry(name: str, size: int, what: str) -> Entry:
    """The entry `name`, which takes `size` bytes when it is filled, after making room for it. `what` is for messages.

    Raises `InputError` when it is larger than the cache may be, when what is in use leaves too little of that, or when
    the disk is too small.
    """
    root, limit = cache_directory(), _limit()
    if size > limit:
        raise InputError(
            f"{what} needs {_gib(size)} GiB in the cache {root}, which may have {_gib(limit)}: it must fit as "
            f"a whole. Set {LIMIT} to a larger number, and {DIRECTORY} to a folder on a disk with room."
        )
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("ab") as deciding:
        _lock(deciding, fcntl.LOCK_EX)
        lock = (root / f"{name}.lock").open("a+b")
        _lock(lock, fcntl.LOCK_SH)
        lock.truncate(0)
        lock.write(str(size).encode())
        lock.flush()
        path = root / name
        _make_room(root, name, limit - size, what)
        path.mkdir(exist_ok=True)
        _require_disk(path, size, what)
        return Entry(path, lock)


def _make_room(root: Path, name: str, room: int, what: str) -> None:
    """Remove the entries that were not used for longest until the others take at most `room` bytes."""
    others = [path for path in root.glob("*.lock") if path.name not in (LOCK, f"{name}.lock")]
    sizes = {path: _noted(path) for path in sorted(others, key=lambda path: path.stat().st_mtime)}
    for path in sizes:
        if sum(sizes.values()) <= room:
            return
        with path.open("ab") as lock:
            if _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink()
                sizes[path] = 0
    if (used := sum(sizes.values())) > room:
        raise InputError(
            f"{what} does not fit into the cache {root} beside the {_gib(used)} GiB that other programs are using. "
            f"Set {LIMIT} to a larger number, or wait for them."
        )


def _noted(lock: Path) -> int:
    text = lock.read_bytes()
    return int(text) if text.isdigit() else 0


def _require_disk(path: Path, size: int, what: str) -> None:
    there, free = 0, shutil.disk_usage(path).free
    for file in path.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has just completed it
            there += file.stat().st_size
    if size - there > free:
        raise InputError(
            f"{what} needs {_gib(size - there)} GiB more on the disk of {path.parent}, and {_gib(free)} are free: make "
            f"room, or set {DIRECTORY} to a folder on another disk."
        )


def _limit() -> int:
    """The largest size of the cache in bytes."""
    return int(positive_from_environment(LIMIT, _DEFAULT_LIMIT, "GiB") * _GIB)


def _lock(file: IO[bytes], how: int) -> bool:
    """Lock an open file; False when another process has it, or where there are no locks."""
    try:
        fcntl.flock(file, how)
    except OSError:
        return False
    return True


def _gib(size: int) -> str:
    return f"{size / _GIB:.3g}"
