"""EDM2's latents: what `dataset_tool.py encode` writes, as a zip or a folder.

`00000/img-mean-std-00000000.npy`, float32 (2C, h, w) = mean and standard deviation; `dataset.json`, {"labels":
[[name, class], …]} or null. REPA has the same layout in a folder vae-sd/, but encodes pictures in [-1, 1], EDM2 in
[0, 1].
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.data.foreign_latents import ForeignLatents
from sit_atconv.data.repa import EXPECTED, RepaFile, read_moments, samples_in
from sit_atconv.data.sources.archive import Archive
from sit_atconv.errors import InputError
from sit_atconv.runtime.reading import parse_json

_LIST, _PATTERN = "dataset.json", "img-mean-std-*.npy"


class Edm2Latents(ForeignLatents):
    """Moments of pictures in [0, 1], one npy a picture."""

    remark = "EDM2 encodes pictures in [0, 1], which is kept with the latents: they are decoded to the same pictures."

    def __init__(self, path: str, spec: LatentSpec, labelled: bool) -> None:
        self._archive = Archive(path) if Path(path).is_file() else None
        self.path = path
        listed = parse_json(self._read(_LIST), RepaFile, f"{path}/{_LIST}", EXPECTED)
        present = self._present() if listed.labels is None else []
        names, labels, class_names = samples_in(listed, present, f"{path}/{_LIST}", labelled)
        super().__init__(path, replace(spec, unit_range=True), len(names), labels, class_names, names)

    def _present(self) -> Sequence[str]:
        if self._archive is None:
            return [file.relative_to(self.path).as_posix() for file in Path(self.path).rglob("*.npy")]
        return [info.filename for info in self._archive.entries() if info.filename.endswith(".npy")]

    def _read(self, name: str) -> bytes:
        if self._archive is not None:
            return self._archive.read(name)
        try:
            return Path(self.path, name).read_bytes()
        except OSError as error:
            raise InputError(f"Cannot read {self.path}/{name}: {error.strerror}.") from error

    def _row(self, index: int, flip: bool) -> np.ndarray:
        return read_moments(io.BytesIO(self._read(self.names[index])), self.where(index), self.latents)


def is_edm2(path: Path) -> bool:
    """Whether a zip or a folder has EDM2's layout."""
    if path.is_file():
        names = [info.filename for info in Archive(str(path)).entries()]
        return _LIST in names and any(name.endswith(".npy") for name in names)
    return (path / _LIST).is_file() and next(path.glob(f"*/{_PATTERN}"), None) is not None
