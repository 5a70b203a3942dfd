"""CPU memory: keeps freed memory in the process for the next allocation."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt, in malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Keep the memory of large freed tensors in the process for the next ones; for runs on a CPU.

    By default glibc returns large blocks to the system, and every new one costs page faults: a training step of a small
    model then takes 40 to 50 % longer (docs/performance.md). On systems without glibc nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
