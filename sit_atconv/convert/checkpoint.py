"""Reads the content of a released checkpoint: the weights to use, under plain names, and the training arguments."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.runtime.weights import read_weights, require_finite

# Names of the weights in a checkpoint, best first: the releases are scored with the averaged ones.
WEIGHTS = ("ema", "model", "state_dict")
_PROJECTORS = "projectors."
_DIT = re.compile(r"(?<![a-z])dit[-_](xl|s|b|l)[-_/]?[248](?!\d)", re.IGNORECASE)  # "DiT-XL/2", "DiT-XL-2-256x256.pt"
_ANCHORS = {"x_embedder.proj.weight": 4, "final_layer.linear.weight": 2, "t_embedder.mlp.0.weight": 2}  # dimensions


@dataclass(frozen=True)
class Released:
    """A released network under its own names, before any conversion.

    `state` and `projectors` (REPA's, without the prefix "projectors.") are fp32 copies on the CPU. `arguments` are
    those of the training script, empty if the file does not contain them. The projectors take the tokens after block
    `aligned_block`, counted from 1; None if it is unknown. `dit` says what names the network a DiT, if anything does:
    SiT has the same tensors, but predicts velocities.
    """

    state: dict[str, Tensor]
    projectors: dict[str, Tensor]
    arguments: dict[str, Any]
    aligned_block: int | None = None
    dit: str | None = None


def read_released(source: str | Path | Mapping[str, Any], weights: str | None = None) -> Released:
    """Read a .pt or .safetensors file, or use a state dict or checkpoint that is already in memory.

    `weights` chooses "ema" or "model" in a checkpoint with several sets; None prefers the averaged one. Raises
    `InputError` for a file that is damaged or not a checkpoint, and for tensors that cannot be weights.
    """
    from_file = isinstance(source, str | Path)
    name = str(source) if from_file else "the checkpoint"
    content = _read(Path(source)) if from_file else source
    if not isinstance(content, Mapping):
        raise InputError(
            f"{name} holds a {type(content).__name__}, not a checkpoint: expected a dictionary of tensors."
        )
    tensors, aligned_block = _plain_names(_choose(content, weights, name), name)
    _require_sit(tensors, name)
    state = {key: _usable(tensor, key, name) for key, tensor in tensors.items()}
    projectors = {key.removeprefix(_PROJECTORS): state.pop(key) for key in list(state) if key.startswith(_PROJECTORS)}
    arguments = _arguments(content)
    dit = _named_dit(arguments, Path(source) if from_file else None)
    return Released(state, projectors, arguments, aligned_block or arguments.get("encoder_depth"), dit)


def _read(path: Path) -> Any:
    if path.is_dir():
        ours = " It is a model of ours: open it with SiT.from_pretrained." if (path / "config.json").exists() else ""
        raise InputError(f"{path} is a directory, not a released checkpoint: name the file in it.{ours}")
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path}.")
    return read_weights(path)


def _choose(content: Mapping[str, Any], weights: str | None, name: str) -> Mapping[str, Tensor]:
    """The state dict in a checkpoint; the checkpoint may itself be the state dict."""
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


def _plain_names(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], int | None]:
    """The tensors, without the name prefixes of DistributedDataParallel, torch.compile and Lightning.

    REPA's first checkpoints count the blocks after the aligned one from 0 again, as decoder_blocks. They are
    renumbered, and the second value is the number of the aligned block; None for other checkpoints.
    """
    parts = {key: [part for part in str(key).split(".") if part not in ("module", "_orig_mod")] for key in tensors}
    plain = {key: ".".join(words[1:] if words[:1] == ["model"] else words) for key, words in parts.items()}
    aligned = len({key.split(".")[1] for key in plain.values() if key.startswith("blocks.")})

    def count_on(match: re.Match[str]) -> str:
        return f"blocks.{aligned + int(match[1])}."

    renamed = {re.sub(r"^decoder_blocks\.(\d+)\.", count_on, plain[key]): tensor for key, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise InputError(f"{name} holds some tensors twice, with and without a wrapper's prefix: keep one of each.")
    legacy = any(key.startswith("decoder_blocks.") for key in plain.values())
    return renamed, aligned if legacy else None


def _require_sit(tensors: Mapping[str, Tensor], name: str) -> None:
    missing = [key for key in _ANCHORS if key not in tensors]
    if not any(key.startswith("blocks.0.") for key in tensors):
        missing.append("blocks.0")
    if missing:
        raise InputError(
            f"{name} is not a SiT: {', '.join(missing)} missing among its {len(tensors)} tensors "
            f"({', '.join(list(tensors)[:3])}, …). Expected a checkpoint of SiT, REPA or ATConv."
        )
    for key, dimensions in _ANCHORS.items():
        if tensors[key].ndim != dimensions:
            raise InputError(f"{key} has the shape {tuple(tensors[key].shape)}: expected {dimensions} dimensions.")
    if any(".q_norm." in key or ".k_norm." in key for key in tensors):
        raise InputError(
            f"The network in {name} normalises queries and keys (attn.q_norm; REPA's --qk-norm). Our attention does "
            "not: it cannot be converted."
        )


def _usable(tensor: Tensor, key: str, name: str) -> Tensor:
    """The tensor as an fp32 copy, so that a model made of it shares nothing with the source.

    A copy of a tensor that repeats its numbers (a stride of 0) could take more memory than there is.
    """
    kind = None
    if tensor.layout != torch.strided:
        kind = f"is a sparse tensor ({tensor.layout})"
    elif tensor.is_meta:
        kind = "has no numbers (it lies on the device meta)"
    elif not tensor.numel():
        kind = f"is empty, of shape {tuple(tensor.shape)}"
    elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        kind = f"of shape {tuple(tensor.shape)} repeats its numbers (strides {tensor.stride()})"
    if kind:
        raise InputError(f"{key} in {name} {kind}: expected a plain tensor that holds the weights.")
    if not tensor.is_floating_point():
        raise InputError(f"{key} in {name} is {tensor.dtype}: quantised or foreign weights cannot be converted.")
    copy = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor.detach())
    require_finite({key: copy}, name)
    return copy


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """The training arguments, with plain numbers for numpy's scalars."""
    found = content.get("args")
    found = vars(found) if isinstance(found, argparse.Namespace) else found if isinstance(found, Mapping) else {}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in found.items()}


def _named_dit(arguments: Mapping[str, Any], path: Path | None) -> str | None:
    """Where the name of a DiT is found: in the arguments, in the file's name, or in that of DiT's folders around it.

    DiT's training program writes NUMBER-DiT-XL-2/checkpoints/STEP.pt.
    """
    model = arguments.get("model")
    if isinstance(model, str):
        return f"its arguments name the model {model}" if _DIT.search(model) else None
    if path is None:
        return None
    places = (path.name, *(parent.name for parent in path.absolute().parents[:2]))
    return next((f"named {place}" for place in places if _DIT.search(place)), None)
