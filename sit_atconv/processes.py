"""The processes that a launcher has started, this one among them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState

from sit_atconv.errors import InputError
from sit_atconv.memory import keep_freed_memory


def process_state(cpu: bool = False) -> PartialState:
    """This process among those of the launcher, on its accelerator, or on the CPU if `cpu` or where there is none.

    Without an accelerator, Accelerate joins processes only if told so. They wait for one another as long as it takes:
    after a restart one may have hours more to do than the others; a dead one is noticed by the launcher.
    """
    cpu = cpu or not torch.accelerator.is_available()
    if cpu:
        keep_freed_memory()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """Wrap what a command does: at its end the process takes its part of the group down, before Python ends.

    Else one of Gloo's threads may still hold a tensor then, which aborts the process now and then
    (pytorch/pytorch#179291), after a message for the user too. Other backends ask that all processes take part, so it
    is only done where nothing went wrong: the others may never come, and the launcher ends who waits for them.
    """
    try:
        yield
    except (InputError, OSError, SystemExit):  # raised between exchanges: Gloo would wait for those under way
        _leave_gloo()
        raise
    _leave_gloo()
    if torch.distributed.is_initialized():
        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()


def _leave_gloo() -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
