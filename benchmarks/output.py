"""Shared by the benchmarks: the option --mixers, and JSON files. Time and memory: `sit_atconv.runtime.measuring`."""

import argparse
import json
from pathlib import Path

import torch

from sit_atconv.models.mixers import list_mixers
from sit_atconv.runtime.measuring.records import command_line, write_rows


def add_mixers(parser: argparse.ArgumentParser) -> None:
    """The option --mixers: names of registered mixers, an empty list for all of them, None if it is not given."""
    what = "compare these registered mixers; without names, all of them"
    parser.add_argument("--mixers", nargs="*", choices=list_mixers(), metavar="NAME", help=what)


def write_json(path: Path, device: torch.device, rows: list[dict], **facts: object) -> None:
    """Write the rows with the command and the machine that produced them, and further facts, and say so."""
    write_rows(path, command_line(), device, rows, **facts)
    print(f"\nWritten to {path}.")


def read_json(path: Path) -> dict:
    """Read a file of `write_json`."""
    return json.loads(path.read_text())
