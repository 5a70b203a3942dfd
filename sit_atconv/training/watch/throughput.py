"""Speed and memory between two lines of the log."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from sit_atconv.training.session.trained import Trained

# Dense tensor-core peaks of bf16 and fp16 in FLOP/s, from the vendor's data sheets, keyed by part of the device's name.
_HALF_PRECISION_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class Interval:
    """Time of training: in all, and since the last line of the log, of which some is spent waiting for data.

    Args:
        flops: of a training step for each image, if they are known.
        before: seconds of training before this start of the run.
    """

    def __init__(self, session: Trained, flops: int | None, before: float = 0.0) -> None:
        self._session, self._flops = session, flops
        self._zero, self._paused_at = time.perf_counter() - before, None
        self._start()

    def _start(self) -> None:
        self._began, self._waited, self._steps = self.seconds, 0.0, 0

    @property
    def seconds(self) -> float:
        """Seconds of training so far, without what `paused` excludes."""
        return (self._paused_at or time.perf_counter()) - self._zero

    def fetch(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The next micro-batch; adds the time it took to the time spent waiting."""
        asked = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - asked
        return batch

    def step(self) -> None:
        """Count one step."""
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude checkpoints, previews and scores from the time of the steps."""
        if self._session.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()  # work still running belongs to the steps
        self._paused_at = time.perf_counter()
        yield
        self._zero += time.perf_counter() - self._paused_at
        self._paused_at = None

    def read(self, step: int) -> dict[str, Any]:
        """Speed since the last call, of the slowest process; the device must be idle. All processes call it."""
        config, accelerator = self._session.config, self._session.accelerator
        mine = (self._waited / self._steps, peak_memory_gib(accelerator.device))
        wait, memory = (max(values) for values in zip(*gather_object([mine]), strict=True))
        total, limit = self.seconds, config.training.max_seconds
        seconds = (total - self._began) / self._steps
        left = seconds * (config.training.steps - step)
        images_per_second = config.training.batch_size / seconds
        peak = peak_flops(accelerator.device, config.training.precision)
        known = peak is not None and self._flops is not None
        self._start()
        return {
            "seconds": total,
            "images_per_second": images_per_second,
            "seconds_per_step": seconds,
            "data_seconds": wait,
            "compute_seconds": seconds - wait,
            "mfu": images_per_second * self._flops / (peak * accelerator.num_processes) if known else None,
            "memory_gib": memory,
            "hours_left": (left if limit is None else min(left, max(limit - total, 0))) / 3600,
        }


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak at this precision in FLOP/s; None where it is not known (CPUs, fp32)."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _HALF_PRECISION_PEAKS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used, in GiB: allocated on the GPU since the last call, or ever resident in this process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
