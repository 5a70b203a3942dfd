"""The peak memory of a call."""

import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sit_atconv.runtime.measuring.timing import Run


def peak_mebibytes(run: Run, device: torch.device) -> float | None:
    """Peak memory of one call beyond the memory in use before it.

    On a CPU, memory of torch's allocator, including temporary tensors within operations, but not oneDNN's own memory.
    None on other devices, which do not measure it.
    """
    if device.type == "cpu":
        return round(_peak_bytes_on_cpu(run) / 2**20, 2)
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 2)


def _peak_bytes_on_cpu(run: Run) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        kept = run()  # the result is freed only after the last event
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = peak = 0
    for _, change in memory:
        held += change
        peak = max(peak, held)
    return peak
