"""Shared functions of the benchmarks: timing in turns, medians, peak memory, the machine, tables, JSON."""

import argparse
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sit_atconv.models.mixers import list_mixers
from sit_atconv.runtime.cpu import keep_freed_memory
from sit_atconv.runtime.whole_files import make_folder_of, whole_file

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


def machine(device: torch.device) -> str:
    """Description of the machine on which the numbers were measured."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    cores = f"{threads} thread{'s' if threads > 1 else ''} of {_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{cores}, torch {torch.__version__}"


def _processor() -> str:
    """The processor's name, family and model on Linux; elsewhere its architecture."""
    facts = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in facts.read_text().splitlines()) if facts.is_file() else ()
    known = {key.strip(): value.strip() for key, _, value in lines}
    if "model name" not in known:
        return platform.machine()
    return f"{known['model name']} (family {known.get('cpu family', '?')}, model {known.get('model', '?')})"


def add_mixers(parser: argparse.ArgumentParser) -> None:
    """The option --mixers: names of registered mixers, an empty list for all of them, None if it is not given."""
    what = "compare these registered mixers; without names, all of them"
    parser.add_argument("--mixers", nargs="*", choices=list_mixers(), metavar="NAME", help=what)


def table(rows: list[dict[str, str | float]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    shown = [[f"{value:,}" if isinstance(value, int) else str(value) for value in each.values()] for each in rows]
    return "\n".join([*lines, *("| " + " | ".join(each) + " |" for each in shown)])


def command_line() -> str:
    """The command line of this program, without the option --json."""
    words = sys.orig_argv[1:]
    if "--json" in words:
        at = words.index("--json")
        words = words[:at] + words[at + 2 :]
    return shlex.join(["python", *words])


def write_json(path: Path, command: str, device: torch.device, rows: list[dict], **facts: object) -> None:
    """Write the rows with the command and the machine that produced them, and further facts."""
    body = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"command": command, "machine": machine(device), **facts}).removesuffix("}")
    make_folder_of(path)
    with whole_file(path) as file:
        file.write(f'{head}, "rows": [\n  {body}\n]}}\n'.encode())
    print(f"\nWritten to {path}.")


def read_json(path: Path) -> dict:
    """Read a file of `write_json`."""
    return json.loads(path.read_text())
