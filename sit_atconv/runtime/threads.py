"""Threads for work that torch must not split further."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


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
