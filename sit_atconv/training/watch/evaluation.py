"""Scores during training: all processes draw samples from the averaged weights and compare them with a reference."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sit_atconv.autoencoder import load_autoencoder
from sit_atconv.config import EvaluationConfig
from sit_atconv.data.latents import LatentDataset
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError, nearest
from sit_atconv.evaluation import Options, Reading, SampleStream, create_features, evaluate, read_reference
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.reading.loading import share
from sit_atconv.evaluation.scoring.choice import POINTS, Metric, choose_metrics, wanted_for
from sit_atconv.models import SiT
from sit_atconv.sampling import generate
from sit_atconv.training.run.measures import HELDOUT, find_score
from sit_atconv.training.watch.drawing import sampler_settings

log = logging.getLogger(__name__)


class Evaluation:
    """Draws samples 0 … n − 1 with the run's seed, balanced over classes, and scores them.

    Raises `InputError` for features, a reference or settings that cannot be used.
    """

    def __init__(self, config: EvaluationConfig, dataset: LatentDataset, seed: int, accelerator: Accelerator) -> None:
        self._config, self._seed, self._accelerator = config, seed, accelerator
        self._said: set[str] = set()  # warnings, which are given once
        if config.samples < 2:
            raise InputError("evaluation.samples must be at least 2: one sample has no covariance.")
        if not Path(config.reference).is_file():  # then it must be a source of pictures: find a typo now
            open_source(config.reference)
        self.settings = sampler_settings(config)
        with accelerator.main_process_first():  # the main process may download the weights
            self._features = create_features(config.features, config.weights, accelerator.device)
        metrics, reading = require_metrics(config, self._features), Reading(config.batch_size)
        self._reference = read_reference(config.reference, self._features, wanted_for(metrics), reading)
        self._options = Options(tuple(metric.name for metric in metrics), reading=reading)
        self._require_comparable(dataset)
        self._require_computable(metrics)
        if not accelerator.is_main_process:
            self._reference.points = {}  # up to 400 MB, which only the main process needs
        self._autoencoder = load_autoencoder(dataset.latents, device=accelerator.device)

    def scores(self, model: SiT) -> dict[str, float]:
        """The metrics by their names in reports. All processes call it; all get the result.

        On one process they are those of `sample.py` and `evaluate_fid.py` with the same settings, to the last bit.
        """
        config, state = self._config, self._accelerator
        mine = share(config.samples, state.process_index, state.num_processes)
        batches = generate(model, self._autoencoder, mine, self.settings, seed=self._seed, batch_size=config.batch_size)
        stream = SampleStream(batches, mine.start, len(mine))
        report = evaluate(stream, self._reference, self._features, self._options)
        if report is not None:
            self._warn([*report.warnings, *(f"No {name}: {reason}." for name, reason in report.unsupported.items())])
        found: list[Any] = [None if report is None else report.metrics]
        return broadcast_object_list(found)[0]

    def _warn(self, warnings: list[str]) -> None:
        """Give the warnings that were not given before."""
        for warning in warnings:
            if warning not in self._said:
                log.warning("Scores during training: %s", warning)
                self._said.add(warning)

    def _require_computable(self, metrics: Sequence[Metric]) -> None:
        """Raise `InputError` for a metric that was asked for, or a goal, which the reference does not allow."""
        asked = (*(self._config.metrics or ()), *(self._config.goals or ()))
        for metric in metrics:
            reason = self._reference.lacks.get("points" if metric.root in POINTS else metric.kind)
            if reason and any(find_score(name, [metric.name]) for name in asked):
                raise InputError(f"{metric.name} cannot be computed with evaluation.reference: {reason}. Leave it out.")

    def _require_comparable(self, dataset: LatentDataset) -> None:
        """Raise `InputError` when features of the data's picture size differ in dimension from the reference's."""
        height, width = (side * dataset.latents.downscale for side in dataset.latent_shape[1:])
        black = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        ours, points = self._features(black)["pool"].shape[1], self._reference.points.get("pool")
        mean, _ = self._reference.gaussians.get("pool", (None, None))
        theirs = len(mean) if mean is not None else ours if points is None else points.shape[1]
        if ours != theirs:
            raise InputError(
                f"Features of {width}x{height} samples have {ours} dimensions, those of evaluation.reference {theirs}: "
                f"take a reference of {width}x{height} pictures."
            )


def require_metrics(config: EvaluationConfig, features: Features) -> tuple[Metric, ...]:
    """The metrics that are computed of samples. Raises `InputError` for unknown ones, and for goals of others."""
    metrics = choose_metrics(features, config.metrics)
    names = [metric.name for metric in metrics]
    if several := [metric.name for metric in metrics if metric.space is None]:
        raise InputError(f"evaluation.metrics names {several[0]}, which is of several features: training has one.")
    for name in config.goals or ():
        if name != HELDOUT and find_score(name, names) is None:
            measured = (*names, *([HELDOUT] if config.loss else []))
            raise InputError(f"evaluation.goals names {name}, which is not measured: {nearest(name, measured)}")
    return metrics
