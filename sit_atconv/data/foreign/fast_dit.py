"""fast-DiT's latents: `…features/0.npy`, a sample (1, C, h, w) times 0.18215, and `…labels/0.npy`, its class (1,)."""

from pathlib import Path

import numpy as np

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.classes import read_labels
from sit_atconv.data.foreign_latents import ForeignLatents
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import BAD_HEADER

_FEATURES, _LABELS = "features", "labels"
_SCALE = 0.18215  # by which its script multiplies samples


class FastDitLatents(ForeignLatents):
    """Samples of Stable Diffusion's autoencoders, one npy a picture."""

    remark = (
        "fast-DiT keeps one sample of each latent, of pictures that it mirrored at random: each is kept as a mean with "
        "standard deviation 0."
    )

    def __init__(self, path: str, spec: LatentSpec, labelled: bool) -> None:
        if (spec.scale, spec.shift) != (_SCALE, 0.0):
            raise InputError(
                f"fast-DiT multiplies latents by {_SCALE}, the scale of Stable Diffusion's autoencoders; that of "
                f"{spec.autoencoder} is {spec.scale} (shift {spec.shift}): give the autoencoder of {path} as --vae."
            )
        self._features = _features_of(Path(path))
        self._classes = _labels_beside(self._features)
        names = sorted(_npy_files(self._features), key=lambda name: (len(name), name))
        labels = class_names = None
        if labelled:
            _require_pairs(self._features, self._classes)
            labels, class_names = read_labels([self._label(name) for name in names], str(self._classes))
        elif not names:
            raise InputError(f"{self._features} holds no latents (*.npy).")
        super().__init__(path, spec, len(names), labels, class_names, names)

    def where(self, index: int) -> str:
        return str(self._features / self.names[index])

    def _label(self, name: str) -> int:
        label = _load(self._classes / name)
        if label.shape not in ((), (1,)):
            raise InputError(f"{self._classes / name} has shape {label.shape}: expected one label, (1,).")
        return label.item()

    def _row(self, index: int, flip: bool) -> np.ndarray:
        sample = _load(self._features / self.names[index])
        sample = sample[0] if sample.ndim == 4 and len(sample) == 1 else sample
        return self._certain(sample, index) / np.float32(_SCALE)


def is_fast_dit(path: Path) -> bool:
    """Whether a folder holds a folder of features beside one of labels."""
    return path.is_dir() and _features_of(path) is not None


def _features_of(path: Path) -> Path | None:
    """The folder `[PREFIX_]features` that has a folder `[PREFIX_]labels` beside it."""
    folders = [folder for folder in sorted(path.glob(f"*{_FEATURES}")) if _labels_beside(folder).is_dir()]
    if len(folders) > 1:
        raise InputError(f"{path} holds {' and '.join(folder.name for folder in folders)}: move all but one away.")
    return folders[0] if folders else None


def _labels_beside(features: Path) -> Path:
    return features.with_name(features.name.removesuffix(_FEATURES) + _LABELS)


def _npy_files(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.npy")}


def _require_pairs(features: Path, labels: Path) -> None:
    for folder, other in ((features, labels), (labels, features)):
        there = _npy_files(folder)
        if alone := there - _npy_files(other):
            raise InputError(f"{folder} holds {min(alone)}, but {other} does not ({len(alone)} of {len(there)} files).")
        if not there:
            raise InputError(f"{folder} holds no files *.npy.")


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, EOFError, MemoryError, *BAD_HEADER) as error:
        raise InputError(f"Cannot read {path}: {error}.") from error
