"""Timing shared by the benchmarks of operator, block and model: contenders in turns, medians, peak memory, JSON."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[[], object]


def default_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def seconds(run: Run, device: torch.device) -> float:
    """How long one call takes: by the device's events on CUDA, else CPU seconds of all threads.

    CPU seconds are not inflated by other programs on the machine. With one thread they are wall time.
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


def median_milliseconds(contenders: dict[str, Run], device: torch.device, turns: int) -> dict[str, float]:
    """Each contender once in every turn, the median of its turns; two calls before that compile, tune and warm up."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
        run()
    for _ in range(turns):
        for name, run in contenders.items():
            found[name].append(1000 * seconds(run, device))
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


def peak_mebibytes(run: Run, device: torch.device) -> float | None:
    """The most memory one call holds beyond what was held before it; None where the device does not count it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 2)


def machine(device: torch.device) -> str:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, {platform.machine()}, torch {torch.__version__}"


def write_json(path: Path | None, command: str, device: torch.device, rows: list[dict]) -> None:
    """The rows with the command and the machine that made them; nothing without a path."""
    if path is not None:
        body = ",\n  ".join(json.dumps(row) for row in rows)
        head = f'{{"command": {json.dumps(command)}, "machine": {json.dumps(machine(device))}'
        path.write_text(f'{head}, "rows": [\n  {body}\n]}}\n')
