"""The processes that a launcher has started, this one among them."""

from datetime import timedelta

import torch
from accelerate import PartialState

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
