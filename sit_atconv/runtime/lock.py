"""A lock that lets only one program at a time write into a directory."""

import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from sit_atconv.errors import InputError

LOCK = ".lock"  # in the directory while a program writes into it
_HELD = (errno.EACCES, errno.EAGAIN)
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:/")  # s3://BUCKET is s3:/BUCKET as a path; a drive has one letter


@contextlib.contextmanager
def locked(directory: Path, state: PartialState | Accelerator, doing: str, choose: str) -> Iterator[None]:
    """Create the directory if necessary, and lock it against other programs until the end of the context.

    The main process holds the lock for all. It is a lock of the operating system, which is released however the process
    ends. Directories created here that are still empty at the end are removed. Where the file system has no locks, none
    is taken.

    Raises `InputError` on all processes when another program holds the lock, or the directory is an address. Its text
    says what that program does with the directory (`doing`, such as "trained into") and which option (`choose`) names
    another directory.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if state.is_main_process:
            try:
                stack.enter_context(lock_folder(directory, doing, choose))
            except InputError as error:
                refusal = str(error)
        (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            raise InputError(refusal)
        yield


class Place:
    """A directory that is written into, to notice when it is moved or removed meanwhile.

    `doing` and `choose` are words for that: "training", "--run".
    """

    def __init__(self, path: Path, doing: str, choose: str) -> None:
        self.path, self._status, self._doing, self._choose = path, path.stat(), doing, choose

    @property
    def is_there(self) -> bool:
        """Whether the directory still is where it was."""
        return self.path.is_dir() and os.path.samestat(self.path.stat(), self._status)

    @property
    def gone(self) -> str:
        """What to tell when it is not."""
        return gone(self.path, self._doing, self._choose)


def gone(path: Path, doing: str, choose: str) -> str:
    """What to tell when a directory is no longer where it was, in the words of `Place`."""
    return (
        f"{path} is gone: it was moved or removed while {doing} went on. Nothing was written in its place. Run the "
        f"same command with its new place as {choose} to continue."
    )


@contextlib.contextmanager
def lock_folder(directory: Path, doing: str, choose: str, wait: bool = False) -> Iterator[None]:
    """`locked` for a program of one process; `wait` for another one that holds the lock instead of raising."""
    if _ADDRESS.match(str(directory)):
        raise InputError(f"{choose} {directory} is an address, not a folder: choose a folder of this machine.")
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (directory, *directory.parents) if path.exists())
        raise InputError(f"{choose} {directory} cannot be a folder, since {file} is a file.") from error
    path = directory / LOCK
    descriptor = _acquire(path, doing, choose, wait)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        there = _is_at(path, descriptor)  # else the directory was moved, and another may be in its place
        if there:
            path.unlink()  # before the release: a program that has opened it meanwhile sees that it is gone
        os.close(descriptor)
        for folder in made if there else []:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _acquire(path: Path, doing: str, choose: str, wait: bool) -> int:
    """A descriptor of the locked file. Raises `InputError` when another process has locked it, unless told to wait."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # The lock belongs to this process only: data workers, which inherit the descriptor, do not hold it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                return descriptor
            holder = os.read(descriptor, 200).decode()
            os.close(descriptor)
            raise InputError(
                f"{path.parent} is {doing} by {holder or 'another process'}: wait for it or stop it, or choose "
                f"another {choose}."
            ) from None
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # its last holder removed it after it was opened here


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False
