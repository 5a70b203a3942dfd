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
def leaving_together() -> Iterator[None]:
    """Wrap what a command does: at its end the processes wait for one another and take their group apart.

    Else one of Gloo's threads may still hold a tensor when Python ends, which aborts the process now and then
    (pytorch/pytorch#179291). After an error nobody waits: the others may never come, and the launcher ends them.
    """
    try:
        yield
    except (InputError, OSError, SystemExit):  # raised between exchanges: Gloo, which would end them first, has none
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()
        raise
    if torch.distributed.is_initialized():
        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()
