"""LightningDiT's latents: safetensors with `latents` and `latents_flip`, samples (n, C, h, w), and `labels` (n,).

`latents_stats.pt` beside them holds their mean and standard deviation for each channel, by which LightningDiT
normalises them when it reads them.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.classes import read_labels
from sit_atconv.data.foreign_latents import ForeignLatents
from sit_atconv.errors import InputError
from sit_atconv.runtime.weights import read_weights

_LATENTS, _FLIPPED, _LABELS = "latents", "latents_flip", "labels"
_STATISTICS = "latents_stats.pt"
_DAMAGE = (SafetensorError, OSError, RuntimeError, ValueError)


class LightningDitLatents(ForeignLatents):
    """Samples of pictures and of mirrored ones; normalised by the statistics if there are any, else as usual."""

    def __init__(self, path: str, spec: LatentSpec, labelled: bool) -> None:
        self._files = sorted(Path(path).glob("*.safetensors"))
        parts, flips = [], set()
        for file in self._files:
            labels, flip = _read_header(file)
            parts.append(labels)
            flips.add(flip)
        if len(flips) > 1:
            raise InputError(f"Some files in {path} have {_FLIPPED} and some do not: give those of one kind.")
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        labels = class_names = None
        if labelled:
            labels, class_names = read_labels(torch.cat(parts).numpy(), f"{path}: {_LABELS}")
        count = int(self._starts[-1])
        if not count:
            raise InputError(f"{path} holds no latents: its files are empty.")
        statistics = Path(path) / _STATISTICS
        normalised = _normalised(spec, statistics) if statistics.is_file() else spec
        super().__init__(path, normalised, count, labels, class_names)
        self.has_flip = flips == {True}
        by = f"{_STATISTICS}, for each channel" if normalised.statistics else "the scale of the autoencoder"
        self.remark = (
            "LightningDiT keeps one sample of each latent: each is kept as a mean with standard deviation 0. They are "
            f"normalised by {by}."
        )

    def where(self, index: int) -> str:
        number, row = self._place(index)
        return f"{self._files[number]}, row {row}"

    def _place(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def _row(self, index: int, flip: bool) -> np.ndarray:
        number, row = self._place(index)
        try:
            with safe_open(self._files[number], "pt") as file:
                sample = file.get_slice(_FLIPPED if flip else _LATENTS)[row : row + 1]
        except _DAMAGE as error:
            raise InputError(f"Cannot read {self.where(index)}: {error}.") from error
        return self._certain(sample[0].float().numpy() if sample.is_floating_point() else sample[0].numpy(), index)


def is_lightning_dit(path: Path) -> bool:
    """Whether a folder holds safetensors with latents."""
    if not path.is_dir() or (first := next(iter(sorted(path.glob("*.safetensors"))), None)) is None:
        return False
    try:
        with safe_open(first, "pt") as file:
            return _LATENTS in file.keys()  # noqa: SIM118, it is no mapping
    except _DAMAGE as error:
        raise InputError(f"{first} is damaged ({error}): fetch it again.") from error


def _read_header(path: Path) -> tuple[Tensor, bool]:
    """The labels in a file, and whether it has mirrored latents; their shapes are checked."""
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names & {_LATENTS, _FLIPPED}}
            labels = file.get_tensor(_LABELS) if _LABELS in names else None
    except _DAMAGE as error:
        raise InputError(f"{path} is damaged ({error}): fetch it again.") from error
    if _LATENTS not in names or labels is None:
        raise InputError(f"{path} has {', '.join(sorted(names))}: expected {_LATENTS} and {_LABELS}.")
    count = len(labels) if labels.ndim else -1
    for name, shape in shapes.items():
        if len(shape) != 4 or shape[0] != count:
            raise InputError(f"{path}: {name} has shape {tuple(shape)}: expected ({count}, C, h, w), as its labels.")
    return labels, _FLIPPED in names


def _normalised(spec: LatentSpec, path: Path) -> LatentSpec:
    """The specification with (z − mean) / std for each channel."""
    content = read_weights(path)
    found = [content.get(name) if isinstance(content, dict) else None for name in ("mean", "std")]
    if not all(isinstance(each, Tensor) and each.numel() == spec.channels for each in found):
        raise InputError(
            f"{path} holds no statistics of {spec.channels} channels: expected mean and std, of shape (1, "
            f"{spec.channels}, 1, 1)."
        )
    mean, std = (each.double().flatten() for each in found)
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise InputError(f"{path}: a standard deviation is not positive, or a number is not finite.")
    scale, shift = tuple((1 / std).tolist()), tuple(mean.tolist())
    return replace(spec, scale=scale, shift=shift, statistics=True)
