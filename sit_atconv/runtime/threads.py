"""Threads for work that torch must not split further."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def single_threaded_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in each of which torch computes with one thread alone.

    CPU kernels choose their order of summation by the number of threads, which a launcher sets. What runs here gives
    the same bits under every launcher, as many pieces at a time as there are threads.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # what threads started later will use
