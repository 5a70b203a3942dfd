"""Sample grids during training, from the averaged weights, with the same noise and labels every time."""

from pathlib import Path

import torch

from sit_atconv.autoencoder import load_autoencoder
from sit_atconv.config import PreviewConfig
from sit_atconv.data.latents import LatentDataset
from sit_atconv.models import SiT
from sit_atconv.sampling import generate
from sit_atconv.sampling.writing.grid import save_grid
from sit_atconv.training.watch.drawing import sampler_settings


class Preview:
    """Draws RUN/samples/step-0010000.png: a row for each of the first classes, or one row of an unconditional model.

    sample.py draws the same from the checkpoint of that step, given the same settings, labels and seed.

    Raises `InputError` at construction, not at the first grid, for settings that cannot be used or an autoencoder that
    cannot be loaded.
    """

    def __init__(
        self, config: PreviewConfig, dataset: LatentDataset, folder: Path, seed: int, device: torch.device
    ) -> None:
        self.config, self.folder, self.seed = config, folder, seed
        self._autoencoder = load_autoencoder(dataset.latents, device=device)
        self.settings = sampler_settings(config)

    def save(self, model: SiT, step: int, caption: str | None = None) -> Path:
        """Draw and write the grid of `step`, with a caption below it; returns its file."""
        columns, rows = self.config.per_class, model.classes.learned[: self.config.classes]
        labels = [label for label in rows for _ in range(columns)] or "balanced"
        count = columns * max(len(rows), 1)
        batches = generate(model, self._autoencoder, range(count), self.settings, labels=labels, seed=self.seed)
        images = torch.cat([batch.images for batch in batches])
        self.folder.mkdir(exist_ok=True)  # not its parent: a run that was moved is not made anew
        path = self.folder / f"step-{step:07d}.png"
        save_grid(images, columns, path, caption)
        return path
