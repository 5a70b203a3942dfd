"""A directory of samples: filled by any number of processes, continued after an interruption, finished as one npz.

While it grows, images lie in a memory-mapped array with one row a sample and a flag that says which rows are there.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image

from sit_atconv.config import config_differences
from sit_atconv.errors import InputError
from sit_atconv.sampling.generate import SampleBatch
from sit_atconv.sampling.grid import pick_for_grid, save_grid

log = logging.getLogger(__name__)


class SampleDirectory:
    """OUT/samples.npz (ADM's keys), OUT/grid.png, OUT/settings.json and, when asked for, OUT/png/000000.png …

    `settings` is all that decides what the samples are. A directory that was begun with other settings is refused;
    one begun with the same is continued.
    """

    def __init__(self, out: Path, count: int, settings: dict[str, Any], png: bool = False) -> None:
        self.out, self.count, self.settings, self.png = out, count, {"num_samples": count, **settings}, png
        self._partial = out / "partial"

    @property
    def npz(self) -> Path:
        return self.out / "samples.npz"

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for is there."""
        return self.npz.exists() and (not self.png or (self.out / "png").exists())

    def prepare(self, size: tuple[int, int]) -> None:
        """Make or check the directory, for images of (height, width); one process calls it, before any `write`.

        Raises `InputError` when it holds samples of other settings.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        settings_path = self.out / "settings.json"
        if settings_path.exists():
            changed = config_differences(json.loads(settings_path.read_text()), self.settings)
            if changed:
                raise InputError(
                    f"{self.out} holds samples drawn with other settings ({'; '.join(changed)}). "
                    "Nothing was changed: choose another --out, or remove the directory."
                )
        elif any(self.out.iterdir()):
            raise InputError(f"{self.out} is not empty and holds no samples of ours: choose another --out.")
        settings_path.write_text(json.dumps(self.settings, indent=2))
        if not self.complete and not (self._partial / "done.npy").exists():
            self._partial.mkdir(exist_ok=True)
            open_memmap(self._partial / "images.npy", "w+", np.uint8, (self.count, *size, 3))
            open_memmap(self._partial / "done.npy", "w+", bool, (self.count,))

    def missing(self) -> np.ndarray:
        """Numbers of the samples that are still to be drawn."""
        return np.flatnonzero(~np.load(self._partial / "done.npy"))

    def write(self, batches: Iterable[SampleBatch]) -> Iterable[int]:
        """Store batches as they come; yields the number of images of each."""
        images = open_memmap(self._partial / "images.npy", "r+")
        done = open_memmap(self._partial / "done.npy", "r+")
        for batch in batches:
            images[batch.indices] = batch.images.permute(0, 2, 3, 1).numpy()
            images.flush()  # a row is flagged once it is on disk
            done[batch.indices] = True
            yield len(batch.indices)

    def finish(self, labels: torch.Tensor | None) -> None:
        """Assemble the npz, the grid and the PNG files from the rows, then drop the rows. One process calls it."""
        images = open_memmap(self._partial / "images.npy", "r")
        picked = pick_for_grid(labels, self.count)
        columns = len(picked) // len(labels[picked].unique()) if labels is not None else 10
        save_grid(torch.from_numpy(images[picked]).permute(0, 3, 1, 2), columns, self.out / "grid.png")
        if self.png:
            self._write_png(images, range(self.count))
        unfinished = self.out / "partial" / "samples.npz"
        np.savez(unfinished, arr_0=images, **({} if labels is None else {"arr_1": labels.numpy()}))
        unfinished.replace(self.npz)
        shutil.rmtree(self._partial)

    def _write_png(self, images: np.ndarray, numbers: Sequence[int]) -> None:
        folder = self._partial / "png"
        folder.mkdir(exist_ok=True)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda i: Image.fromarray(images[i]).save(folder / f"{i:06d}.png"), numbers))
        folder.replace(self.out / "png")
