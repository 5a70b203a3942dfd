"""The CPU: its name and cores, threads that torch must not split further, freed memory that stays for the next use."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt, in malloc.h
_LARGEST = 2**31 - 1


@contextlib.contextmanager
def single_threaded_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in each of which torch uses a single thread.

    CPU kernels choose their order of summation by the number of threads, which a launcher sets. Work in this pool gives
    the same bits under every launcher, and still runs on several cores.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # for threads started later


def processor() -> str:
    """The processor's name, family and model on Linux; elsewhere its architecture."""
    facts = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in facts.read_text().splitlines()) if facts.is_file() else ()
    known = {key.strip(): value.strip() for key, _, value in lines}
    if "model name" not in known:
        return platform.machine()
    return f"{known['model name']} (family {known.get('cpu family', '?')}, model {known.get('model', '?')})"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_workers(workers: int | None, device: torch.device) -> int:
    """The requested number of processes that read pictures, or as many as help a network on `device`."""
    return workers if workers is not None else min(2 if device.type == "cpu" else 16, cores())


def keep_freed_memory() -> None:
    """Keep the memory of large freed tensors in the process for the next ones; for runs on a CPU.

    By default glibc returns large blocks to the system, and every new one costs page faults: a training step of a small
    model then takes 40 to 50 % longer (docs/performance.md). On systems without glibc nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
