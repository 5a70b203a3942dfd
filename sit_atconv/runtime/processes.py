"""The processes that a launcher has started, this one among them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState

from sit_atconv.runtime.memory import keep_freed_memory


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
    """Wrap what a command does: when it is done, the process leaves its group, before Python ends.

    Else one of Gloo's threads may still hold a tensor then, which aborts the process now and then
    (pytorch/pytorch#179291). Gloo is left without waiting: who waits for a process that fails ends in a traceback.
    Other backends ask that all take part. After an error the group is left as it is: an exchange may be under way.
    """
    yield
    if torch.distributed.is_initialized():
        state = PartialState()
        if torch.distributed.get_backend() != "gloo":
            state.wait_for_everyone()
        state.destroy_process_group()
