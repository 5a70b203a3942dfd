"""The JSON files of the benchmarks."""

import json
from pathlib import Path

import torch

from sit_atconv.runtime.measuring.records import command_line, write_rows


def write_json(path: Path, device: torch.device, rows: list[dict], **facts: object) -> None:
    """Write the rows with the command and the machine that produced them, and further facts, and say so."""
    write_rows(path, command_line(), device, rows, **facts)
    print(f"\nWritten to {path}.")


def read_json(path: Path) -> dict:
    """Read a file of `write_json`."""
    return json.loads(path.read_text())
