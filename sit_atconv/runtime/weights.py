"""Reads a weights file from elsewhere without running code from it.

torch's restricted unpickler builds only tensors, plain containers and argparse.Namespace, in which training programs
store their arguments.
"""

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sit_atconv.errors import InputError


def read_weights(path: Path) -> Any:
    """The content of a safetensors or torch file, whatever its suffix.

    Raises `InputError` when the file is damaged, or when reading it would run code.
    """
    if _is_safetensors(path):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({error}): fetch it again.") from None
    mapped = zipfile.is_zipfile(path)  # then the optimizer state, twice the size of the weights, is never read
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged bytes may raise almost any exception in the unpickler
        raise _unreadable(path, error) from None


def _is_safetensors(path: Path) -> bool:
    """Whether a JSON header follows the eight bytes of its length, which no torch file has."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _unreadable(path: Path, error: Exception) -> InputError:
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign:
        return InputError(
            f"{path} was pickled with {foreign[1]}, and reading that could run code: only tensors and "
            "argparse.Namespace are read. If you trust the file, save its weights alone again, as safetensors or with "
            "torch.save."
        )
    lines = re.sub(r"(?s).*WeightsUnpickler error: ", "", str(error)).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
    return InputError(f"{path} is damaged, or no weights file of torch or safetensors ({reason}). Fetch it again.")
