"""Directories prepared with REPA's own scripts, read as they are; `prepare.importing` converts them to shards.

Layout: `vae-sd/00000/img-mean-std-00000000.npy`, float32 (8, h, w) = mean and standard deviation of the SD autoencoder;
`vae-sd/dataset.json`, {"labels": [[name, class], …]} or null; `images/00000/img00000000.png`, the crops.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.classes import read_labels
from sit_atconv.data.latents import LatentDataset, empty_batch
from sit_atconv.data.pictures.decode import decode_image
from sit_atconv.data.pictures.protocol import SourceImage, SourceOptions
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import BAD_HEADER
from sit_atconv.runtime.reading import Text, read_json

LATENTS, IMAGES = "vae-sd", "images"
EXPECTED = 'Expected {"labels": [[name, class], …]}, or null for labels.'
# The autoencoder of REPA's preprocessing, which records no hash of the weights.
REPA_SPEC = LatentSpec("stabilityai/sd-vae-ft-mse", None, 4, 8, 0.18215, 0.0)
_SAMPLED = 64  # latents that a fingerprint covers


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


class RepaDataset(LatentDataset):
    """The latents of a REPA directory: one file per sample, none mirrored.

    `spec` names their autoencoder and scale, since the directory does not. `labels` is int64 (len,) or None;
    `resolution` is the (height, width) of the pictures.
    """

    has_flip = False

    def __init__(self, path: str, spec: LatentSpec = REPA_SPEC, labelled: bool = True) -> None:
        self._root, self.latents = Path(path), spec
        self.names, self.labels, self.class_names = _names_and_labels(self._root, labelled)
        self._targets = np.full(len(self.names), -1) if self.labels is None else self.labels
        self.num_classes = 0 if self.labels is None else len(self.class_names or ()) or int(self.labels.max()) + 1
        self.empty_classes = sorted(set(range(self.num_classes)) - set(self._targets.tolist()))
        height, width = self._grid()
        self.latent_shape = (spec.channels, height, width)
        self.resolution = (height * spec.downscale, width * spec.downscale)
        self.has_images = (self._root / IMAGES).is_dir()

    def _grid(self) -> tuple[int, int]:
        """(h, w) of the first latent that can be read; damaged ones are named when a batch reads them."""
        failures = []
        for name in self.names:
            try:
                return self._moments_in(name).shape[1:]
            except InputError as error:
                failures.append(error)
        raise failures[0]

    def _moments_in(self, name: str) -> np.ndarray:
        path = self._root / LATENTS / name
        return read_moments(path, str(path), self.latents)

    def unlisted(self) -> list[str]:
        """Latent files that dataset.json does not name, relative to the directory."""
        listed, root = set(self.names), self._root / LATENTS
        names = (path.relative_to(root).as_posix() for path in root.rglob("*.npy"))
        return sorted(f"{LATENTS}/{name}" for name in names if name not in listed)

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self, teachers: Sequence[int] = ()) -> str:
        """Covers all names and labels but only some latents: there may be millions of files, and no list of digests."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        digest.update(np.ascontiguousarray(self._targets, dtype=np.int64))
        for index in np.linspace(0, len(self) - 1, min(_SAMPLED, len(self)), dtype=int):
            with contextlib.suppress(OSError):  # named when a batch reads it
                digest.update((self._root / LATENTS / self.names[index]).read_bytes())
        return digest.hexdigest()

    def where(self, index: int) -> str:
        return str(self._root / LATENTS / self.names[index])

    def _moments(self, indices: Sequence[int], flips: Sequence[bool]) -> Tensor:
        expected = (2 * self.latent_shape[0], *self.latent_shape[1:])
        moments = empty_batch((len(indices), *expected), torch.float32)
        for out, index in zip(moments.numpy(), indices, strict=True):
            row = self._moments_in(self.names[index])
            if row.shape != expected:
                raise InputError(f"{self.where(index)}: shape {row.shape} among latents of {expected}.")
            out[:] = row
        return moments

    def _labels(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._targets[np.asarray(indices)]).long()

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
