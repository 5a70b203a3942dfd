"""Directories prepared with REPA's own scripts, read as they are; `prepare.importing` converts them to shards.

Layout: `vae-sd/00000/img-mean-std-00000000.npy`, float32 (8, h, w) = mean and standard deviation of the SD autoencoder;
`vae-sd/dataset.json`, {"labels": [[name, class], …]} or null; `images/00000/img00000000.png`, the crops.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.classes import read_labels
from sit_atconv.data.foreign_latents import ForeignLatents
from sit_atconv.data.pictures.decode import decode_image
from sit_atconv.data.pictures.protocol import SourceImage, SourceOptions
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import BAD_HEADER
from sit_atconv.runtime.reading import Text, read_json

LATENTS, IMAGES = "vae-sd", "images"
EXPECTED = 'Expected {"labels": [[name, class], …]}, or null for labels.'
# The autoencoder of REPA's preprocessing, which records no hash of the weights.
REPA_SPEC = LatentSpec("stabilityai/sd-vae-ft-mse", None, 4, 8, 0.18215, 0.0)


def is_repa(directory: str | Path) -> bool:
    """Whether a directory was prepared by REPA's scripts."""
    return (Path(directory) / LATENTS / "dataset.json").is_file()


@dataclass(frozen=True)
class RepaFile:
    """vae-sd/dataset.json: names of samples and their classes."""

    labels: list[tuple[Text, Any]] | None = None


class RepaSource:
    """The crops of a REPA directory as an `ImageSource`."""

    kind = "repa"
    lossy = False

    def __init__(self, path: str, options: SourceOptions) -> None:
        self._root, self._options = Path(path), options
        self.names, self.labels, self.class_names = _names_and_labels(self._root, not options.unconditional)
        if not (self._root / IMAGES).is_dir():
            raise InputError(f"{path} was prepared for REPA but has no {IMAGES}/: there are no pictures here.")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> SourceImage:
        name = _image_name(self.names[index])
        label = None if self.labels is None else int(self.labels[index])
        return _read_image(self._root, self.names[index], self._options, label, name)


class RepaDataset(ForeignLatents):
    """The latents of a REPA directory: one file per sample, none mirrored.

    `spec` names their autoencoder and scale, since the directory does not. `labels` is int64 (len,) or None;
    `resolution` is the (height, width) of the pictures.
    """

    def __init__(self, path: str, spec: LatentSpec = REPA_SPEC, labelled: bool = True) -> None:
        self._root = Path(path)
        names, labels, class_names = _names_and_labels(self._root, labelled)
        self.has_images = (self._root / IMAGES).is_dir()
        super().__init__(str(self._root / LATENTS), spec, len(names), labels, class_names, names)

    def unlisted(self) -> list[str]:
        """Latent files that dataset.json does not name, relative to the directory."""
        listed, root = set(self.names), self._root / LATENTS
        names = (path.relative_to(root).as_posix() for path in root.rglob("*.npy"))
        return sorted(f"{LATENTS}/{name}" for name in names if name not in listed)

    def _row(self, index: int, flip: bool) -> np.ndarray:
        return read_moments(Path(self.where(index)), self.where(index), self.latents)

    def _digested(self, index: int) -> bytes:
        return Path(self.where(index)).read_bytes()

    def _image(self, index: int) -> np.ndarray:
        return _read_image(self._root, self.names[index], SourceOptions()).image


def _names_and_labels(root: Path, labelled: bool) -> tuple[list[str], np.ndarray | None, list[str] | None]:
    """Names of latent files, relative to vae-sd/, their labels or None, and the classes' names or None."""
    path = root / LATENTS / "dataset.json"
    listed = read_json(path, RepaFile, EXPECTED)
    present = (root / LATENTS).rglob("*.npy") if listed.labels is None else ()
    names = [file.relative_to(root / LATENTS).as_posix() for file in present]
    return samples_in(listed, names, str(path), labelled)


def samples_in(
    listed: RepaFile, present: Sequence[str], where: str, labelled: bool
) -> tuple[list[str], np.ndarray | None, list[str] | None]:
    """Sorted names of latent files, their labels or None, and the classes' names or None.

    They are those of the list, which `where` names in errors; a list of null means all files that are `present`.
    """
    pairs = listed.labels
    if pairs is None:
        if not present:
            raise InputError(f"{where} lists no samples, and there are no latents (*.npy) beside it.")
        return sorted(present), None, None
    rows = {name.replace("\\", "/"): row for row, (name, _) in enumerate(pairs)}
    if not rows:
        raise InputError(f"{where} lists no samples.")
    if len(rows) < len(pairs):
        raise InputError(f"{where} lists {len(pairs) - len(rows)} names more than once: their labels are ambiguous.")
    names = sorted(rows)
    latents = [_latent_name(name) for name in names]
    if not labelled:
        return latents, None, None
    labels, class_names = read_labels([label for _, label in pairs], where)
    return latents, labels[[rows[name] for name in names]], class_names


def _latent_name(name: str) -> str:
    """The name in vae-sd/ of a listed sample; some releases list the names of pictures instead."""
    return name if name.endswith(".npy") else name.replace("/img", "/img-mean-std-").replace(".png", ".npy")


def _image_name(latent_name: str) -> str:
    """00000/img-mean-std-00000000.npy -> 00000/img00000000.png."""
    return latent_name.replace("img-mean-std-", "img").replace(".npy", ".png")


def _read_image(
    root: Path, latent_name: str, options: SourceOptions, label: int | None = None, name: str | None = None
) -> SourceImage:
    path = root / IMAGES / _image_name(latent_name)
    try:
        return decode_image(path.read_bytes(), str(path), options, label, name)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error


def read_moments(file: Path | BinaryIO, where: str, spec: LatentSpec) -> np.ndarray:
    """Mean and standard deviation (2C, h, w) in an npy that `where` names. Raises `InputError` for anything else."""
    try:
        moments = np.load(file, allow_pickle=False)
    except (OSError, EOFError, MemoryError, *BAD_HEADER) as error:
        raise InputError(f"Cannot read latent {where}: {error}.") from error
    if moments.ndim != 3 or moments.shape[0] != 2 * spec.channels or moments.dtype != np.float32:
        raise InputError(
            f"{where}: {moments.dtype} {moments.shape}, expected float32 ({2 * spec.channels}, h, w): mean and "
            f"standard deviation of the autoencoder {spec.autoencoder}."
        )
    return moments
