"""What a run writes and measures while it trains: log, grids of samples, scores."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from sit_atconv.config.ranges import (
    ClosedUnitInterval,
    Few,
    NonNegativeFloat,
    Number,
    PositiveFloat,
    Solver,
    Steps,
    if_set,
)
from sit_atconv.runtime.reading import Text


@dataclass(frozen=True)
class LogConfig:
    """What a run writes, and how often.

    Args:
        every: steps between lines of log.jsonl.
        checkpoint_every: steps between checkpoints; the last step always writes one.
        keep: number of newest checkpoints to keep; null keeps all.
        keep_every: checkpoints at multiples of this many steps are kept as well.
        trackers: Accelerate's trackers to use beside log.jsonl, such as tensorboard or wandb.
    """

    every: Steps = 100
    checkpoint_every: Steps = 10_000
    keep: Steps | None = 3
    keep_every: Steps | None = None
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)


@dataclass(frozen=True)
class PreviewConfig:
    """Grids of samples drawn during training, from the averaged weights, with the same noise and labels every time.

    Args:
        every: steps between grids; null for none.
        classes: rows of the grid, one for each of the first classes; an unconditional model draws one row.
        per_class: columns of the grid.
        solver: see sample.py.
        steps: solver steps.
        guidance: guidance scale; 1 is none.
        interval: times within which guidance acts.
        internal_guidance: scale of Internal Guidance by the head after model.internal_block; 1 is none.
        internal_interval: times within which it acts.
    """

    every: Steps | None = 10_000
    classes: Few = 8
    per_class: Few = 8
    solver: Solver = "heun"
    steps: Few = 25
    guidance: NonNegativeFloat = 1.0
    interval: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.0, 1.0)
    internal_guidance: NonNegativeFloat = if_set(1.0)
    internal_interval: tuple[ClosedUnitInterval, ClosedUnitInterval] = if_set((0.0, 1.0))


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of the averaged weights during training: of samples, as evaluate_fid.py does, the held-out loss, or both.

    All processes take part. The checkpoint with the lowest score so far is marked as checkpoints/best and kept: of the
    first metric for which lower is better, or without such a metric of the held-out loss.

    Args:
        reference: what samples are compared with, as for evaluate_fid.py: ADM's npz, pictures, or "digits:heldout@8";
            null for no samples.
        loss: measure the loss of data.heldout.
        every: steps between evaluations.
        samples: number of samples to draw.
        features: "inception", "pixels" or "timm:MODEL".
        weights: local file of the features' weights; null to download them.
        metrics: what to compute of the samples, as --metrics of evaluate_fid.py; null for all of the features.
        goals: score -> value that is to be reached, such as {fid: 2.0}, of the metrics or of heldout_loss: the first
            evaluation that is as good logs epochs_to_fid_2, the epochs so far. Null for none.
        batch_size: for each process; does not change the scores.
        solver: see sample.py.
        steps: solver steps.
        guidance: guidance scale; 1 is none.
        interval: times within which guidance acts.
        internal_guidance: scale of Internal Guidance by the head after model.internal_block; 1 is none.
        internal_interval: times within which it acts.
    """

    reference: Text | None = None
    loss: bool = False
    every: Steps = 50_000
    samples: Number = 5_000
    features: Text = "inception"
    weights: Text | None = None
    metrics: Annotated[list[Text], Meta(min_length=1)] | None = None
    goals: dict[Text, PositiveFloat] | None = None
    batch_size: Number = 64
    solver: Solver = "heun"
    steps: Few = 25
    guidance: NonNegativeFloat = 1.0
    interval: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.0, 1.0)
    internal_guidance: NonNegativeFloat = if_set(1.0)
    internal_interval: tuple[ClosedUnitInterval, ClosedUnitInterval] = if_set((0.0, 1.0))
