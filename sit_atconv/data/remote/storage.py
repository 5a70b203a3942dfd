"""Files at an address of any protocol that fsspec knows: s3://, gs://, hf://, https://, file://, memory:// …"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import reset_lock

from sit_atconv.errors import FULL_DISK, InputError

_WITH_FOLDERS = {"file", "local", "sftp", "ssh", "smb", "hdfs"}  # elsewhere a folder is part of an object's name


def is_remote(path: str | Path) -> bool:
    """Whether `path` is an address with a protocol."""
    return "://" in str(path)


class Storage:
    """A file, or a folder of files, at an address. Names are relative to it; "" is the address itself.

    Every process connects when it first needs to, since connections do not survive a fork. All methods raise
    `InputError` when the storage cannot be reached or refuses.
    """

    def __init__(self, address: str) -> None:
        self.address = address if address.endswith("://") else address.rstrip("/")
        self._connection: tuple[int, fsspec.AbstractFileSystem, str] | None = None

    def info(self, name: str = "") -> dict[str, Any] | None:
        """What fsspec knows of a file or folder, "type" and "size" at least; None if there is none."""
        with self._explained("read", name):
            system, path = self._at(name)
            try:
                return system.info(path)
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes:
        """The contents of a file."""
        with self._explained("read", name):
            system, path = self._at(name)
            return system.cat_file(path)

    def names(self) -> list[str]:
        """All files in the folder and its subfolders."""
        with self._explained("list", ""):
            system, root = self._at("")
            return [path.removeprefix(root).lstrip("/") for path in system.find(root)]

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to `path`."""
        with self._explained("fetch", name):
            system, source = self._at(name)
            system.get_file(source, str(path))

    def put(self, path: Path, name: str) -> None:
        """Copy a local file to `name`."""
        with self._explained("write", name):
            system, target = self._at(name, create=True)
            system.put_file(str(path), target)

    def require_writable(self) -> None:
        """Write a small file and remove it again."""
        with self._explained("write", ""):
            system, path = self._at(".unfinished-probe", create=True)
            system.pipe_file(path, b"-")
            with contextlib.suppress(PermissionError):  # writing may be allowed without removing
                system.rm_file(path)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_connection": None}

    def _at(self, name: str, create: bool = False) -> tuple[fsspec.AbstractFileSystem, str]:
        """The file system, and the path of a file on it, whose folder is made first if `create`."""
        if self._connection is None or self._connection[0] != os.getpid():
            if self._connection is not None:
                reset_lock()  # in a forked process; earlier versions of fsspec would hang
            system, root = fsspec.url_to_fs(self.address)
            system.invalidate_cache()  # fsspec shares connections, and what they have listed
            self._connection = (os.getpid(), system, root)
        _, system, root = self._connection
        if create and _WITH_FOLDERS & {system.protocol, *system.protocol}:
            system.makedirs(root, exist_ok=True)
        return system, f"{root}/{name}" if name else root

    @contextlib.contextmanager
    def _explained(self, doing: str, name: str) -> Iterator[None]:
        where = f"{self.address}/{name}" if name else self.address
        try:
            yield
        except FileNotFoundError as error:
            raise InputError(f"Cannot {doing} {where}: it does not exist ({_line(error)}).") from error
        except ImportError as error:
            raise InputError(f"Cannot {doing} {where}: its protocol needs another package. {_line(error)}.") from error
        except Exception as error:  # every protocol's package has errors of its own
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                raise
            raise InputError(
                f"Cannot {doing} {where}: {type(error).__name__}: {_line(error)}. Check the address, the credentials "
                "and the connection."
            ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500].rstrip(".")
