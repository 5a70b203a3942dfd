"""The loss of held-out data: the error of the network's own prediction, at fixed times and with fixed noise."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from sit_atconv.autoencoder import sample_posterior
from sit_atconv.data.latents import LatentDataset
from sit_atconv.evaluation.features.grouping import Grouped
from sit_atconv.evaluation.reading.loading import share
from sit_atconv.flow import create_interpolant, flow_matching_loss
from sit_atconv.models import SiT
from sit_atconv.randomness import Stream, keyed_normal
from sit_atconv.sampling.encoded import labels_for

TIMES = [(k + 0.5) / 8 for k in range(8)]
_SEED = 0  # of noise and posterior samples: all models are measured with the same ones
_GROUP = 4  # pictures that the network is given at once, each at all times


class HeldOutLoss:
    """Measures models on held-out data. The numbers have the same bits for any batch size, processes and threads.

    Args:
        dataset: comparable with the model (`require_measurable`).
        batch_size: pictures that a process reads at once.
        state: the processes, which divide the pictures.
    """

    def __init__(self, dataset: LatentDataset, batch_size: int, state: Accelerator | PartialState) -> None:
        self._dataset, self._state = dataset, state
        self._step = math.ceil(batch_size / _GROUP) * _GROUP  # so that a group has the same pictures everywhere

    def scores(self, model: SiT, progress: bool = False) -> dict[str, float | None]:
        """The loss at each of `TIMES`, "heldout_loss_t0.0625", …, after their mean, "heldout_loss"; None if not finite.

        A time is a place in the range of times of the model's prediction (`Interpolant.time_range`). The model is in
        fp32. All processes call it; all get the result. `progress` shows a bar.
        """
        groups = share(math.ceil(len(self._dataset) / _GROUP), self._state.process_index, self._state.num_processes)
        mine = range(groups.start * _GROUP, min(groups.stop * _GROUP, len(self._dataset)))
        found = [np.empty((0, len(TIMES)))]
        with tqdm(total=len(mine), unit="img", desc="held-out loss", disable=not progress) as bar:
            for part in self._losses(model, mine):
                found.append(part.double().cpu().numpy())
                bar.update(len(part))
        losses = np.concatenate(gather_object([np.concatenate(found)]))  # (n, 8), in the order of the data
        means = losses.sum(axis=0) / len(losses)  # numpy adds row by row
        values = [means.mean(), *means]
        names = ["heldout_loss", *(f"heldout_loss_t{time:g}" for time in TIMES)]
        return {name: float(v) if np.isfinite(v) else None for name, v in zip(names, values, strict=True)}

    def _losses(self, model: SiT, indices: range) -> Iterator[Tensor]:
        """Losses (b, 8) of the samples at `indices`, batch by batch."""
        grouped = Grouped(_Errors(model, self._dataset), self._state.device, _GROUP)
        for first in range(indices.start, indices.stop, self._step):
            chunk = list(range(first, min(first + self._step, indices.stop)))
            batch = self._dataset.read(chunk, [False] * len(chunk))
            labels = labels_for(model, self._dataset, batch["label"], chunk)
            rows = [self._dataset.row(index) for index in chunk]
            draws = [self._draw(stream, rows) for stream in (Stream.HELD_OUT_POSTERIOR, Stream.HELD_OUT_NOISE)]
            inputs = [batch["moments"], *draws, *([] if labels is None else [labels])]
            yield grouped(*inputs)["loss"]

    def _draw(self, stream: Stream, rows: list[int]) -> Tensor:
        """Normal numbers (b, 8, C, H, W), each keyed by row and time."""
        shape = self._dataset.latent_shape
        return torch.stack([keyed_normal(_SEED, stream, rows, shape, k) for k in range(len(TIMES))], dim=1)


class _Errors:
    """The loss of a model at all times: moments (b, 2C, H, W) with their draws and labels -> {"loss": (b, 8)}."""

    def __init__(self, model: SiT, dataset: LatentDataset) -> None:
        self._model, self._spec, self._prediction = model, dataset.latents, model.config.prediction
        self._interpolant = create_interpolant(model.config.interpolant)
        low, high = self._interpolant.time_range(self._prediction)
        self._times = torch.tensor([low + (high - low) * time for time in TIMES], device=model.device)

    def __call__(
        self, moments: Tensor, posterior: Tensor, noise: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        count, times = noise.shape[:2]
        latents = sample_posterior(moments.repeat_interleave(times, 0), posterior.flatten(0, 1), self._spec)
        y = None if labels is None else labels.repeat_interleave(times)

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            return self._model(x_t, t, y)

        t = self._times.repeat(count)
        loss = flow_matching_loss(network, latents, noise.flatten(0, 1), t, self._interpolant, self._prediction)
        return {"loss": loss.view(count, times)}
