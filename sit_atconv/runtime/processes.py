"""The processes that a launcher has started."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState

from sit_atconv.runtime.fellows import join_fellows
from sit_atconv.runtime.memory import keep_freed_memory

# How long processes wait for one another's work: after a restart one may have hours more to do than the others. The
# launcher detects dead processes.
WAIT_FOR_WORK = timedelta(days=7)


def process_state(cpu: bool = False) -> PartialState:
    """The state of this process: on its accelerator, or on the CPU if `cpu` is set or there is no accelerator.

    Without an accelerator, Accelerate connects processes only if it is told to use the CPU.
    """
    cpu = cpu or not torch.accelerator.is_available()
    if cpu:
        keep_freed_memory()
    return PartialState(cpu=cpu, timeout=WAIT_FOR_WORK)


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """Wrap a command's work: its processes wait for one another before it, and end together after it.

    When one fails, only that one reports why, and all exit with its code (`Fellows`). After success, each process
    destroys the process group before Python ends: otherwise a thread of Gloo may still hold a tensor at exit, which
    sometimes aborts the process (pytorch/pytorch#179291). After an error the group is kept, since a collective
    operation may be running.

    Raises `InputError` when other processes do not arrive (`join_fellows`).
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
