"""Reads a weights file from elsewhere without running code from it, and checks that it holds weights.

torch's restricted unpickler builds only tensors, the plain things of `pickles`, and argparse.Namespace, in which
training programs store their arguments.
"""

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.runtime.pickles import PLAIN

_PLAIN = [argparse.Namespace, *((function, name) for name, function in PLAIN.items())]
_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


def read_weights(path: Path) -> Any:
    """The content of a safetensors or torch file, whatever its suffix.

    Raises `InputError` when the file is damaged, or when reading it would run code.
    """
    if _is_safetensors(path):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is damaged ({error}): fetch it again.") from None
    try:
        mapped = zipfile.is_zipfile(path)  # then the optimizer state, twice the size of the weights, is never read
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged bytes may raise almost any exception in the unpickler
        raise _unreadable(path, error) from None


def require_floats(path: Path) -> None:
    """Raise `InputError` naming the first tensor of a safetensors file that holds integers or other foreign numbers.

    They would be converted to fp32 without a word. Reads the header alone; what is no such file is a SafetensorError.
    """
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            kind = file.get_slice(name).get_dtype()
            if kind not in _FLOATS:
                raise InputError(
                    f"{name} in {path} holds {kind} numbers: expected floating point ({', '.join(_FLOATS)}). "
                    "Quantised or foreign weights cannot be used as they are: save the model in fp32 again."
                )


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `InputError` naming the first tensor in which there are NaN or infinite values."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise InputError(
                f"{name} in {where} has {count} values that are NaN or infinite: these weights are of no use."
            )


def _is_safetensors(path: Path) -> bool:
    """Whether a JSON header follows the eight bytes of its length, which no torch file has."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _unreadable(path: Path, error: Exception) -> InputError:
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign:
        return InputError(
            f"{path} was pickled with {foreign[1]}, and reading that could run code: only tensors, numbers, paths, "
            "plain containers and argparse.Namespace are read. If you trust the file, save its weights alone again, as "
            "safetensors or with torch.save."
        )
    lines = re.sub(r"(?s).*WeightsUnpickler error: ", "", str(error)).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
    return InputError(f"{path} is damaged, or no weights file of torch or safetensors ({reason}). Fetch it again.")
