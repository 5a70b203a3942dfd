"""Memory on a CPU: what a program frees and takes again all the time should stay with it."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt, in malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """From now on large tensors that are freed stay in the process, for the next ones; for a run on a CPU.

    By default glibc hands large blocks back to the system, and every new one costs page faults: a training step of a
    small model then takes 40 to 50 % longer (docs/performance.md). Without glibc (other systems) nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
