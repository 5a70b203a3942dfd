"""One run directory, one training at a time."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sit_atconv.errors import InputError

LOCK = ".lock"  # in the run directory, while it is trained into
_HELD = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def locked(run: Path, accelerator: Accelerator) -> Iterator[None]:
    """Make the run directory if need be, and keep it from other trainings until the end of the context.

    The main process holds the lock for all. It is the operating system's and ends with the process, however that ends.
    Directories made here that are still empty at the end are removed. A file system without locks is used without.

    Raises `InputError` on all processes when another training holds it.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(_lock(run))
            except InputError as error:
                refusal = str(error)
        (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            raise InputError(refusal)
        yield


@contextlib.contextmanager
def _lock(run: Path) -> Iterator[None]:
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    path = run / LOCK
    descriptor = _acquire(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: who opened it meanwhile sees that it is no longer there
        os.close(descriptor)
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _acquire(path: Path) -> int:
    """A descriptor of the locked file. Raises `InputError` when another process has locked it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # The lock is this process's alone: data workers, which inherit the descriptor, do not hold it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                return descriptor
            holder = os.read(descriptor, 200).decode()
            os.close(descriptor)
            raise InputError(
                f"{path.parent} is trained into by {holder or 'another process'}: wait for it or stop it, or choose "
                "another --run."
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # its last holder has removed it since it was opened
