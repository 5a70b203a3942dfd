"""What was measured, as a table and as JSON, with the command and the machine."""

import json
import shlex
import sys
from pathlib import Path

import torch

from sit_atconv.runtime.cpu import processor
from sit_atconv.runtime.whole_files import make_folder_of, whole_file


def machine(device: torch.device) -> str:
    """Description of the machine on which the numbers were measured."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    cores = f"{threads} thread{'s' if threads > 1 else ''} of {processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{cores}, torch {torch.__version__}"


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


def write_rows(path: Path, command: str, device: torch.device, rows: list[dict], **facts: object) -> None:
    """Write the rows with the command and the machine that produced them, and further facts."""
    body = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"command": command, "machine": machine(device), **facts}).removesuffix("}")
    make_folder_of(path)
    with whole_file(path) as file:
        file.write(f'{head}, "rows": [\n  {body}\n]}}\n'.encode())
