"""The processes that a launcher has started."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.queues import Queue

import torch
from accelerate import PartialState

from sit_atconv.runtime.cpu import keep_freed_memory
from sit_atconv.runtime.peers import join_peers

# How long processes wait for one another's work: after a restart one may have hours more to do than the others. The
# launcher detects dead processes.
WAIT_FOR_WORK = timedelta(days=7)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def process_state(cpu: bool = False) -> PartialState:
    """The state of this process: on its accelerator, or on the CPU if `cpu` is set or there is no accelerator.

    Without an accelerator, Accelerate connects processes only if it is told to use the CPU.
    """
    cpu = cpu or not torch.accelerator.is_available()
    if cpu:
        keep_freed_memory()
    return PartialState(cpu=cpu, timeout=WAIT_FOR_WORK)


def die_with_parent() -> None:
    """On Linux, let this process be killed when its parent dies, however that happens; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_when_unable_to_send(worker: int) -> None:
    """For data loading processes (`worker_init_fn`): end when a batch cannot be handed on, which DataLoader reports.

    Shared memory may be full, or larger than files may be (ulimit -f). Python's queue would drop the batch and go on,
    and the program would wait for it for good.
    """
    Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))  # the hook that Python has for this


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """Wrap a command's work: its processes wait for one another before it, and end together after it.

    When one fails, only that one reports why, and all exit with its code (`Peers`). After success, each process
    destroys the process group before Python ends: otherwise a thread of Gloo may still hold a tensor at exit, which
    sometimes aborts the process (pytorch/pytorch#179291). After an error the group is kept, since a collective
    operation may be running.

    Raises `InputError` when other processes do not arrive (`join_peers`).
    """
    peers = join_peers()
    try:
        yield
        if torch.distributed.is_initialized():
            PartialState().wait_for_everyone()
    except BaseException as error:
        code = None if peers is None else peers.leave_after(error)
        if code is None:
            raise
        raise SystemExit(code) from None
    finally:
        if peers is not None:
            peers.leave()
    if torch.distributed.is_initialized():
        PartialState().destroy_process_group()
