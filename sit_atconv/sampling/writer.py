"""A directory of samples: filled by any number of processes, continued after an interruption, finished as one npz.

While it grows, images lie in a memory-mapped array with one row a sample and a flag that says which rows are there.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image

from sit_atconv.config import config_differences
from sit_atconv.data.npz import read_npz_member
from sit_atconv.errors import InputError
from sit_atconv.sampling.generate import SampleBatch
from sit_atconv.sampling.grid import pick_for_grid, save_grid


class SampleDirectory:
    """OUT/samples.npz (ADM's keys), OUT/grid.png, OUT/settings.json and, when asked for, OUT/png/000000.png …

    `settings` is all that decides what the samples are. A directory that was begun with other settings is refused;
    one begun with the same is continued.
    """

    def __init__(self, out: Path, count: int, settings: dict[str, Any], png: bool = False) -> None:
        self.out, self.count, self.settings, self.png = out, count, {"num_samples": count, **settings}, png
        self.npz, self._partial = out / "samples.npz", out / "partial"

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for is there."""
        return self.npz.exists() and (not self.png or (self.out / "png").exists())

    def prepare(self, size: tuple[int, int]) -> None:
        """Make or check the directory, for images of (height, width); one process calls it, before any `write`.

        Raises `InputError` when it holds samples of other settings, or the disk has no room for these.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        if self.npz.exists():
            shutil.rmtree(self._partial, ignore_errors=True)  # left by a run that was killed while it tidied up
        elif not (self._partial / "done.npy").exists():
            self._allocate((self.count, *size, 3))

    def _check_settings(self) -> None:
        path = self.out / "settings.json"
        if not path.exists():
            if any(self.out.iterdir()):
                raise InputError(f"{self.out} is not empty and holds no samples of ours: choose another --out.")
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.settings, indent=2))
            unfinished.replace(path)
            return
        try:
            found = json.loads(path.read_text())
        except ValueError:
            raise InputError(f"{path} is damaged: remove {self.out}, or choose another --out.") from None
        if changed := config_differences(found, self.settings):
            raise InputError(
                f"{self.out} holds samples drawn with other settings ({'; '.join(changed)}). "
                "Nothing was changed: choose another --out, or remove the directory."
            )

    def _allocate(self, shape: tuple[int, ...]) -> None:
        """Reserve the rows: a memory map that the disk cannot fill later would kill the process without a word."""
        needed, free = 2 * int(np.prod(shape)), shutil.disk_usage(self.out).free  # the rows, and the npz made of them
        if needed > free:
            raise InputError(
                f"{shape[0]} images of {shape[2]}x{shape[1]} need {needed / 2**30:.1f} GiB in {self.out}, and "
                f"{free / 2**30:.1f} are free: make room, or choose another --out."
            )
        self._partial.mkdir(exist_ok=True)
        open_memmap(self._partial / "images.npy", "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            with (self._partial / "images.npy").open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        open_memmap(self._partial / "flags.npy", "w+", bool, shape[:1])
        (self._partial / "flags.npy").rename(self._partial / "done.npy")  # last, and whole: it says that all is ready

    def missing(self) -> np.ndarray:
        """Numbers of the samples that are still to be drawn."""
        if self.npz.exists():
            return np.arange(0)
        return np.flatnonzero(~np.load(self._partial / "done.npy"))

    def write(self, batches: Iterable[SampleBatch]) -> Iterator[int]:
        """Store batches as they come; yields how many samples are there by now, whichever process drew them."""
        images = open_memmap(self._partial / "images.npy", "r+")
        done = open_memmap(self._partial / "done.npy", "r+")
        with ThreadPoolExecutor() as pool:
            for batch in batches:
                pixels = batch.images.permute(0, 2, 3, 1).numpy()
                if self.png:
                    list(pool.map(self._save_png, batch.indices, pixels))
                images[batch.indices] = pixels
                images.flush()  # a row is flagged once it is on disk
                done[batch.indices] = True
                yield int(done.sum())

    def finish(self, labels: torch.Tensor | None) -> None:
        """Assemble npz, grid and PNG files from the rows, then drop the rows. One process calls it.

        Samples that were complete already get the PNG files that this call asks for and an earlier one did not.
        """
        if self.png and not (self.out / "png").exists():
            self._finish_png()
        if not self.npz.exists():
            images = open_memmap(self._partial / "images.npy", "r")
            picked = pick_for_grid(labels, self.count)
            columns = len(picked) // len(labels[picked].unique()) if labels is not None else 10
            save_grid(torch.from_numpy(images[picked]).permute(0, 3, 1, 2), columns, self.out / "grid.png")
            unfinished = self._partial / "samples.npz"
            np.savez(unfinished, arr_0=images, **({} if labels is None else {"arr_1": labels.numpy()}))
            unfinished.replace(self.npz)
        shutil.rmtree(self._partial)

    def _finish_png(self) -> None:
        rows = self._partial / "images.npy"
        images = open_memmap(rows, "r") if rows.exists() else read_npz_member(str(self.npz), "arr_0")
        written = {path.stem for path in (self._partial / "png").glob("*.png")}
        left = [i for i in range(self.count) if f"{i:06d}" not in written]  # drawn before PNG files were asked for
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda i: self._save_png(i, images[i]), left))
        (self._partial / "png").replace(self.out / "png")

    def _save_png(self, index: int, pixels: np.ndarray) -> None:
        folder = self._partial / "png"
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{index:06d}.unfinished"
        Image.fromarray(pixels).save(unfinished, format="PNG")
        unfinished.replace(folder / f"{index:06d}.png")
