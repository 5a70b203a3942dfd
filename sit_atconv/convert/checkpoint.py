"""Reading a released checkpoint: which of its weights, under plain names, and what its training arguments say.

No pickled code ever runs: torch's restricted unpickler builds tensors and plain containers, and beside them one class,
argparse.Namespace, in which the releases store their arguments.
"""

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sit_atconv.errors import InputError

# What a checkpoint calls its weights, best first: the averaged ones are what the releases are scored with.
WEIGHTS = ("ema", "model", "state_dict")
_PROJECTORS = "projectors."


@dataclass(frozen=True)
class Released:
    """A released network under its own names, before anything is changed.

    `state` and `projectors` (REPA's, without the prefix "projectors.") are fp32 copies on the CPU; `arguments` is what
    the training script was called with, empty when the file does not say.
    """

    state: dict[str, Tensor]
    projectors: dict[str, Tensor]
    arguments: dict[str, Any]


def read_released(source: str | Path | Mapping[str, Any], weights: str | None = None) -> Released:
    """Read a .pt or .safetensors file, or take a state dict or checkpoint that is in memory already.

    `weights` chooses "ema" or "model" of a checkpoint that holds several; None takes the averaged ones where there are
    any. Raises `InputError` for a file that is no checkpoint or damaged, and for tensors that cannot be weights.
    """
    from_file = isinstance(source, str | Path)
    name = str(source) if from_file else "the checkpoint"
    content = read_file(Path(source)) if from_file else source
    if not isinstance(content, Mapping):
        raise InputError(
            f"{name} holds a {type(content).__name__}, not a checkpoint: expected a dictionary of tensors."
        )
    tensors = _plain_names(_choose(content, weights, name), name)
    state = {key: _usable(tensor, key, name) for key, tensor in tensors.items()}
    projectors = {key.removeprefix(_PROJECTORS): state.pop(key) for key in list(state) if key.startswith(_PROJECTORS)}
    return Released(state, projectors, _arguments(content))


def read_file(path: Path) -> Any:
    """The content of a .safetensors or torch file. Raises `InputError` where it is missing, damaged or holds code."""
    if path.is_dir():
        ours = " It is a model of ours: open it with SiT.from_pretrained." if (path / "config.json").exists() else ""
        raise InputError(f"{path} is a directory, not a released checkpoint: name the file in it.{ours}")
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is damaged or no safetensors file ({error}): fetch it again.") from None
    mapped = zipfile.is_zipfile(path)  # then the optimiser's state, twice the weights, is never read
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged bytes lead the unpickler into nearly any of them
        raise _unreadable(path, str(error) or type(error).__name__) from None


def _unreadable(path: Path, reason: str) -> InputError:
    foreign = re.search(r"GLOBAL ([\w.]+)", reason)
    if foreign:
        return InputError(
            f"{path} was pickled with {foreign[1]}, and reading that could run code: only tensors and "
            "argparse.Namespace are read. If you trust the file, save its weights alone (its 'ema') again, as "
            "safetensors or with torch.save."
        )
    return InputError(
        f"{path} cannot be read as a checkpoint of torch ({reason.strip().splitlines()[0][:160]}): it is damaged or "
        "something else. Fetch it again."
    )


def _choose(content: Mapping[str, Any], weights: str | None, name: str) -> Mapping[str, Tensor]:
    """The state dict within a checkpoint, which may be one itself."""
    there = [key for key in WEIGHTS if isinstance(content.get(key), Mapping)]
    if weights is not None and weights not in there:
        raise InputError(f"{name} has no '{weights}' weights; it has {' and '.join(there) or 'one unnamed set'}.")
    chosen = content[weights or there[0]] if there else content
    other = next((key for key, value in chosen.items() if not isinstance(value, Tensor)), None)
    if other is not None or not chosen:
        found = "it is empty" if other is None else f"'{other}' in it is a {type(chosen[other]).__name__}"
        raise InputError(
            f"{name} is not a checkpoint: {found}. Expected a dictionary of tensors, or one with such a dictionary "
            f"under {', '.join(WEIGHTS)}."
        )
    return chosen


def _plain_names(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors without what DistributedDataParallel, torch.compile and Lightning put before their names.

    REPA's first checkpoints count the blocks behind the aligned one from 0 again, as decoder_blocks: count on.
    """
    parts = {key: [part for part in str(key).split(".") if part not in ("module", "_orig_mod")] for key in tensors}
    plain = {key: ".".join(words[1:] if words[:1] == ["model"] else words) for key, words in parts.items()}
    aligned = len({key.split(".")[1] for key in plain.values() if key.startswith("blocks.")})

    def count_on(match: re.Match[str]) -> str:
        return f"blocks.{aligned + int(match[1])}."

    renamed = {re.sub(r"^decoder_blocks\.(\d+)\.", count_on, plain[key]): tensor for key, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise InputError(f"{name} holds some tensors twice, with and without a wrapper's prefix: keep one of each.")
    return renamed


def _usable(tensor: Tensor, key: str, name: str) -> Tensor:
    """The tensor as an fp32 copy, so that a model made of it shares nothing with the source."""
    if not tensor.is_floating_point():
        raise InputError(f"{key} in {name} is {tensor.dtype}: quantised or foreign weights cannot be converted.")
    copy = torch.empty(tensor.shape).copy_(tensor.detach())
    if not copy.isfinite().all():
        count = int((~copy.isfinite()).sum())
        raise InputError(f"{key} in {name} has {count} values that are NaN or infinite: these weights are of no use.")
    return copy


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    arguments = content.get("args")
    if isinstance(arguments, argparse.Namespace):
        return vars(arguments)
    return dict(arguments) if isinstance(arguments, Mapping) else {}
