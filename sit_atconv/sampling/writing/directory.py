"""A directory of samples: filled by any number of processes, continued after an interruption, finished as one npz.

Until then, images are rows of a memory-mapped array, and a second array holds a digest of each written row: a run that
is continued uses only rows that match their digest.
"""

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image

from sit_atconv.config import config_differences
from sit_atconv.data.sources.npz import CLASS_NAMES, read_npz_member
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import naming
from sit_atconv.runtime.lock import LOCK
from sit_atconv.runtime.reading import read_json, understand
from sit_atconv.runtime.whole_files import leftovers, remove_leftovers, whole_file, write_json
from sit_atconv.sampling.generate import SampleBatch
from sit_atconv.sampling.writing.grid import pick_for_grid, save_grid

log = logging.getLogger(__name__)

SETTINGS = "settings.json"
_DIGEST = 16  # bytes; zero for rows that are not written yet
_FLAGS = "done.npy"  # an earlier version's record of the written rows, without digests


@dataclass(frozen=True)
class SettingsFile:
    """The part of settings.json beside the settings themselves: hashes of each model's files, by setting."""

    sha256: dict[str, dict[str, str]]


class SampleDirectory:
    """OUT/samples.npz (ADM's keys), OUT/grid.png, OUT/settings.json and, if requested, OUT/png/000000.png …

    A program that writes into it must hold the directory's lock.
    """

    def __init__(self, out: Path, count: int, png: bool = False) -> None:
        self.out, self.count, self.png = out, count, png
        self.npz, self.grid = out / "samples.npz", out / "grid.png"
        self._partial, self._pngs = out / "partial", out / "png"
        self._rows, self._digests = self._partial / "images.npy", self._partial / "digests.npy"

    @property
    def complete(self) -> bool:
        """Whether all requested files exist."""
        pngs = not self.png or (self._pngs.exists() and not self._lacking_png())
        return self.npz.exists() and self.grid.exists() and pngs

    def prepare(self, size: tuple[int, int], settings: dict[str, Any]) -> None:
        """Create or check the directory, for images of (height, width); one process calls it, before any `write`.

        Args:
            settings: everything that determines the samples, except their number. `sha256` maps each setting that is
                the path of a model to the hashes of its files. A directory with other settings or models is refused;
                one with the same settings and models is continued.

        Raises:
            InputError: when it holds samples of other settings or models, or an incomplete file of samples, or the disk
                has too little room. Nothing is written then.
        """
        settings, shape = {"num_samples": self.count, **settings}, (self.count, *size, 3)
        begun = self._begun_with(settings)
        remove_leftovers(self.out)
        if self.npz.exists():
            self._check_npz(shape)
            shutil.rmtree(self._partial, ignore_errors=True)  # left by a run that was killed during cleanup
        shutil.rmtree(self._partial / "png", ignore_errors=True)  # written again from rows that have digests
        self._require_room(shape)
        if not begun:
            write_json(self.out / SETTINGS, settings)
        if not self.npz.exists():
            self._reserve(shape)

    def _begun_with(self, settings: dict[str, Any]) -> bool:
        """Whether samples of these settings were begun here. Raises `InputError` for other settings or files."""
        path = self.out / SETTINGS
        if not path.exists():
            if set(self.out.iterdir()) - {self.out / LOCK, *leftovers(self.out)}:
                raise InputError(f"{self.out} is not empty and holds no samples of this program: choose another --out.")
            return False
        found = read_json(path, dict[str, Any], f"Remove {self.out}, or choose another --out.")
        hashes = understand(found, SettingsFile, str(path), f"Remove {self.out}, or choose another --out.").sha256
        del found["sha256"]
        found.setdefault("weights", settings.get("weights"))  # earlier versions did not note them
        if changed := config_differences(found, {key: value for key, value in settings.items() if key != "sha256"}):
            raise InputError(
                f"{self.out} holds samples drawn with other settings ({'; '.join(changed)}). "
                "Nothing was changed: choose another --out, or remove the directory."
            )
        for what, files in settings["sha256"].items():
            was = hashes.get(what, {})
            if differing := [name for name in {**was, **files} if was.get(name) != files.get(name)]:
                raise InputError(
                    f"The model at {settings[what]} is not the one that the samples in {self.out} were drawn from: "
                    f"{', '.join(differing)} changed since. Choose another --out, or remove that directory."
                )
        return True

    def _check_npz(self, shape: tuple[int, ...]) -> None:
        """Raise `InputError` unless the finished file is undamaged and its images have this shape."""
        advice = "Remove it, and the same command draws the samples again; or choose another --out."
        try:
            images = read_npz_member(str(self.npz), "arr_0")
        except InputError as error:
            raise InputError(f"{error} {advice}") from None
        if images.shape != shape or images.dtype != np.uint8:
            raise InputError(f"{self.npz} holds {images.dtype} {images.shape}, expected uint8 {shape}. {advice}")

    def _require_room(self, shape: tuple[int, ...]) -> None:
        """Check that the disk has room for the rows, the npz and the PNG files that do not exist yet.

        A PNG is counted with the size of its pixels, which is larger unless the image is noise.
        """
        reserved = self._rows.stat().st_size if self._rows.exists() else 0
        needed = 0 if self.npz.exists() else 2 * math.prod(shape) - min(reserved, math.prod(shape))
        if self.png:
            needed += max(0, self.count - len(self._written_png())) * math.prod(shape[1:])
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise InputError(
                f"{shape[0]} images of {shape[2]}x{shape[1]} need {_readable(needed)} in {self.out}, and "
                f"{_readable(free)} are free: make room, or choose another --out."
            )

    def _reserve(self, shape: tuple[int, ...]) -> None:
        """Create the files of rows and digests, or repair them after an interruption; written values stay."""
        self._partial.mkdir(exist_ok=True)
        if (flags := self._partial / _FLAGS).exists():
            log.warning("%s was begun by an earlier version, without digests: its samples are drawn again.", self.out)
            flags.unlink()
        _reserve_array(self._rows, shape)
        _reserve_array(self._digests, (self.count, _DIGEST))

    def missing(self) -> np.ndarray:
        """Numbers of the samples still to be drawn: their rows are not written yet, or do not match their digests."""
        if self.npz.exists():
            return np.arange(0)
        images, digests = open_memmap(self._rows, "r"), np.array(open_memmap(self._digests, "r"))
        noted = np.flatnonzero(digests.any(axis=1))
        damaged = [i for i in noted if not np.array_equal(_digest(images[i]), digests[i])]
        if damaged:
            log.warning("%d samples in %s are damaged and are drawn again.", len(damaged), self._partial)
        return np.setdiff1d(np.arange(self.count), np.setdiff1d(noted, damaged))

    def write(self, batches: Iterable[SampleBatch]) -> Iterator[int]:
        """Store batches as they arrive; yields how many samples exist so far, over all processes."""
        images, digests = open_memmap(self._rows, "r+"), open_memmap(self._digests, "r+")
        with ThreadPoolExecutor() as pool:
            for batch in batches:
                pixels = batch.images.permute(0, 2, 3, 1).numpy()
                if self.png:
                    list(pool.map(self._save_png, batch.indices, pixels))
                images[batch.indices] = pixels
                images.flush()  # a row's digest is written after the row is on disk
                digests[batch.indices] = [_digest(image) for image in pixels]
                yield int(digests.any(axis=1).sum())

    def finish(self, labels: torch.Tensor | None, class_names: Sequence[str] | None = None) -> None:
        """Assemble npz, grid and PNG files from the rows, then delete the rows. One process calls it.

        For samples that were complete already, missing grid and PNG files are added. `class_names` stand beside the
        labels in the npz, so that classes can be compared by name.
        """
        finished = self.npz.exists()  # and was verified by `prepare`
        images = read_npz_member(str(self.npz), "arr_0", verify=False) if finished else open_memmap(self._rows, "r")
        if self.png:
            self._finish_png(images)
        if not (self.npz.exists() and self.grid.exists()):
            self._finish_grid(images, labels)
        if not self.npz.exists():
            arrays = {} if labels is None else {"arr_1": labels.numpy()}
            arrays |= {CLASS_NAMES: np.array(class_names)} if labels is not None and class_names else {}
            with whole_file(self.npz) as file:
                np.savez(file, arr_0=images, **arrays)
        del images  # some storage keeps the files that are mapped, and with them their folder
        shutil.rmtree(self._partial, ignore_errors=True)  # what another process maps goes at the next start

    def _finish_grid(self, images: np.ndarray, labels: torch.Tensor | None) -> None:
        picked = pick_for_grid(labels, self.count)
        columns = len(picked) // len(labels[picked].unique()) if labels is not None else 10
        save_grid(torch.from_numpy(images[picked]).permute(0, 3, 1, 2), columns, self.grid)

    def _finish_png(self, images: np.ndarray) -> None:
        self._partial.mkdir(exist_ok=True)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda i: self._save_png(i, images[i]), self._lacking_png()))
        if not self._pngs.exists():
            (self._partial / "png").replace(self._pngs)

    @property
    def _png_folder(self) -> Path:
        """Where PNG files are written: OUT/png if it exists, else a folder that becomes OUT/png when complete."""
        return self._pngs if self._pngs.exists() else self._partial / "png"

    def _lacking_png(self) -> list[int]:
        """Numbers of the samples without a PNG file: not drawn yet, drawn before --png was given, or lost."""
        written = self._written_png()
        return [i for i in range(self.count) if f"{i:06d}" not in written]

    def _written_png(self) -> set[str]:
        return {path.stem for path in self._png_folder.glob("*.png")}

    def _save_png(self, index: int, pixels: np.ndarray) -> None:
        self._png_folder.mkdir(exist_ok=True)  # not its parents: a directory that was moved is not made anew
        with whole_file(self._png_folder / f"{index:06d}.png") as file:
            Image.fromarray(pixels).save(file, "PNG")


def _reserve_array(path: Path, shape: tuple[int, ...]) -> None:
    """Make `path` a uint8 npy file of this shape: set its header and length, and keep existing values.

    Disk space is reserved now: a memory map on a full disk would kill the process without an error message.
    """
    with naming(path), path.open("r+b" if path.exists() else "w+b") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.flush()
        size = file.tell() + math.prod(shape)
        if os.fstat(file.fileno()).st_size < size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)


def _digest(image: np.ndarray) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(image)).digest()[:_DIGEST], np.uint8)


def _readable(size: float) -> str:
    """A number of bytes in the largest unit that it fills: "512 bytes", "2.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{round(size, 1):g} {unit}"
        size /= 1024
    return f"{round(size, 1):g} GiB"
