"""All numbers of an evaluation: metrics of each space, FDr over spaces, and their confidence intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from sit_atconv.evaluation.features.spaces import Spaces
from sit_atconv.evaluation.scoring.bootstrap import intervals
from sit_atconv.evaluation.scoring.choice import Metric
from sit_atconv.evaluation.scoring.ratios import Ratios, fdr_name
from sit_atconv.evaluation.scoring.scores import Comparison


@dataclass
class Scores:
    """Entries of the report, see `Report`."""

    values: dict[str, float]
    lacks: dict[str, str]
    intervals: dict[str, dict[str, float]] = field(default_factory=dict)
    floors: dict[str, dict[str, float]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)


def score(
    metrics: Sequence[Metric],
    comparison: Comparison,
    spaces: Spaces,
    divisors: Mapping[str, float] | str | None,
    resamples: int,
) -> Scores:
    """Compute the metrics of a comparison, and intervals from `resamples` resamples (0: none)."""
    for metric in metrics:
        if metric.space:
            comparison.compute(metric)
    scores = Scores(comparison.values, comparison.lacks, floors=comparison.floors)
    if resamples:
        scores.intervals = intervals(comparison, resamples)
    if any(metric.space is None for metric in metrics):
        ratios, name = Ratios(comparison, spaces, divisors), fdr_name(divisors)
        scores.values[name] = ratios.value
        scores.ratios = {of: asdict(part) for of, part in ratios.parts.items()}
        if resamples:
            scores.intervals[name] = ratios.interval(resamples)
    return scores
