"""The processes that a launcher has started, this one among them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.queues import Queue

import torch
from accelerate import PartialState

from sit_atconv.runtime.fellows import join_fellows
from sit_atconv.runtime.memory import keep_freed_memory

# How long processes wait for one another's work: after a restart one may have hours more to do than the others. A dead
# one is noticed by the launcher.
WAIT_FOR_WORK = timedelta(days=7)


def process_state(cpu: bool = False) -> PartialState:
    """This process among those of the launcher, on its accelerator, or on the CPU if `cpu` or where there is none.

    Without an accelerator, Accelerate joins processes only if told so.
    """
    cpu = cpu or not torch.accelerator.is_available()
    if cpu:
        keep_freed_memory()
    return PartialState(cpu=cpu, timeout=WAIT_FOR_WORK)


def end_when_unable_to_send(worker: int) -> None:
    """For data loading processes (`worker_init_fn`): end when a batch cannot be handed on, which DataLoader reports.

    Shared memory may be full, or larger than files may be (ulimit -f). Python's queue would drop the batch and go on,
    and the program would wait for it for good.
    """
    Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))  # the hook that Python has for this


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """Wrap what a command does: its processes meet before it, and leave together after it.

    When one fails, it alone tells why, and all leave with its exit code (`Fellows`). When all is done, each leaves the
    group before Python ends: else one of Gloo's threads may still hold a tensor then, which aborts the process now and
    then (pytorch/pytorch#179291). After an error the group is left as it is: an exchange may be under way.

    Raises `InputError` when the others do not come (`join_fellows`).
    """
    fellows = join_fellows()
    try:
        yield
        if torch.distributed.is_initialized():
            PartialState().wait_for_everyone()
    except BaseException as error:
        code = None if fellows is None else fellows.leave_after(error)
        if code is None:
            raise
        raise SystemExit(code) from None
    finally:
        if fellows is not None:
            fellows.leave()
    if torch.distributed.is_initialized():
        PartialState().destroy_process_group()
