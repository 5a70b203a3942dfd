"""MAR's cached latents: `CLASS/NAME.npz` with `moments` and `moments_flip`, (2C, h, w) = mean and log variance."""

from pathlib import Path

import numpy as np

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.classes import read_labels
from sit_atconv.data.foreign_latents import ForeignLatents
from sit_atconv.data.sources.npz import npz_members, read_npz_member

_MOMENTS, _FLIPPED = "moments", "moments_flip"
_LOG_VARIANCE = (-30, 20)  # to which latent diffusion limits it


class MarLatents(ForeignLatents):
    """Moments of pictures and of mirrored ones, one npz a picture, in folders that are the classes."""

    def __init__(self, path: str, spec: LatentSpec, labelled: bool) -> None:
        names = sorted(file.relative_to(path).as_posix() for file in Path(path).glob("*/*.npz"))
        labels = class_names = None
        if labelled:
            labels, class_names = read_labels([name.split("/")[0] for name in names], f"the folders in {path}")
        super().__init__(path, spec, len(names), labels, class_names, names)
        self.has_flip = _FLIPPED in npz_members(self.where(self._first))

    def _row(self, index: int, flip: bool) -> np.ndarray:
        moments = read_npz_member(self.where(index), _FLIPPED if flip else _MOMENTS)
        mean, log_variance = np.split(self._checked(moments, 2 * self.latents.channels, index), 2)
        return np.concatenate([mean, np.exp(0.5 * np.clip(log_variance, *_LOG_VARIANCE))])


def is_mar(path: Path) -> bool:
    """Whether a folder holds folders with npz files."""
    return path.is_dir() and next(path.glob("*/*.npz"), None) is not None
