"""The duration of calls, measured in turns: medians."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from sit_atconv.runtime.cpu import keep_freed_memory

Run = Callable[[], object]


def default_device() -> torch.device:
    """The accelerator if there is one; else the CPU, where freed memory is kept from now on, as in training."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    keep_freed_memory()
    return torch.device("cpu")


def seconds(run: Run, device: torch.device) -> float:
    """Duration of one call: by the device's events on CUDA, else in CPU seconds of all threads.

    CPU seconds are not inflated by other programs on the machine. With one thread they equal wall time.
    """
    if device.type != "cuda":
        began = time.process_time()
        run()
        return time.process_time() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def in_turns(
    contenders: Mapping[str, Callable[[], object]], turns: int, measure: Callable[[Callable], object]
) -> dict[str, list]:
    """`measure` each contender once in every turn, so that a temporary slowdown of the machine affects all of them."""
    found: dict[str, list] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, contender in contenders.items():
            found[name].append(measure(contender))
    return found


def median_milliseconds(contenders: Mapping[str, Run], device: torch.device, turns: int) -> dict[str, float]:
    """The median over turns for each contender; two calls beforehand compile, tune and warm up."""
    for run in contenders.values():
        run()
        run()
    found = in_turns(contenders, turns, lambda run: 1000 * seconds(run, device))
    return {name: round(statistics.median(values), 4) for name, values in found.items()}
