"""Bootstrap confidence intervals (Efron 1979): how much metrics vary between samples from the same model."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sit_atconv.evaluation.metrics.cmmd import cmmd_replicates
from sit_atconv.evaluation.metrics.distances import IS_CHUNK, KID_SUBSETS, FrechetTarget, InceptionScoreSums
from sit_atconv.evaluation.metrics.sliced import Resampled
from sit_atconv.evaluation.scoring.choice import Metric
from sit_atconv.evaluation.scoring.scores import Comparison
from sit_atconv.randomness import Stream, keyed_generator

COVERAGE = (2.5, 97.5)  # percentiles


def intervals(comparison: Comparison, resamples: int) -> dict[str, dict[str, float]]:
    """Standard deviation and 95 % interval of every number in `comparison`, metric -> {"std", "low", "high"}.

    Samples are resampled with replacement `resamples` times; the reference and, for precision and recall, the balls
    stay fixed (for recall the reference points are resampled). Repeated images increase a Fréchet distance, so the
    replicates are shifted to have the number itself as their mean. KID's interval is normal, from the spread of its
    subsets. This needs the features of all samples ("pool", and those of the metrics).
    """
    result = {}
    for name, metric in comparison.metrics.items():
        if name not in comparison.values:
            continue
        value = comparison.values[name]
        if metric.root == "kid":
            result[name] = _normal(value, _kid_error(comparison, name, metric.kind))
        elif metric.root in ("precision", "recall"):
            result[name] = around(value, _shares(comparison.inside[metric.kind][metric.root], resamples))
        elif metric.root == "cmmd":
            result[name] = around(value, _cmmds(comparison, metric.kind, resamples))
        else:
            result[name] = around(value, replicates(_draw(comparison, metric), resamples, name))
    return result


def _draw(comparison: Comparison, metric: Metric) -> Callable[[np.random.Generator], float]:
    """A function that draws one replicate of a metric."""
    if metric.root == "is":
        return _scores(comparison.samples.kept[f"{metric.space.prefix}probabilities"])
    if metric.root == "mind":
        return _minds(comparison, metric)
    return distances(comparison, metric.kind, comparison.target(metric.kind))


def replicates(draw: Callable[[np.random.Generator], float], resamples: int, name: str) -> np.ndarray:
    """`resamples` replicates, drawn by keyed generators: replicate i of all metrics has the same samples."""
    numbers = tqdm(range(resamples), desc=f"bootstrap of {name}", unit="resample")
    return np.array([draw(keyed_generator(0, Stream.BOOTSTRAP, number)) for number in numbers])


def distances(comparison: Comparison, kind: str, target: FrechetTarget) -> Callable[[np.random.Generator], float]:
    """A function that draws one Fréchet distance, from moments of weighted samples, in float32 about their mean."""
    features = comparison.samples.kept[kind]
    centre = comparison.samples.moments[kind].mean()

    def draw(generator: np.random.Generator) -> float:
        n, device = len(features), centre.device
        weights = torch.from_numpy(_counts(generator, n).astype(np.float32))
        total = torch.zeros(features.shape[1], device=device)
        products = torch.zeros(features.shape[1], features.shape[1], device=device)
        for part, weight in zip(features.split(4096), weights.split(4096), strict=True):
            x, weight = part.to(device) - centre.float(), weight.to(device)
            total += weight @ x
            products.addmm_((x * weight[:, None]).T, x)
        shift = (total / n).double()
        covariance = (products.double() - n * torch.outer(shift, shift)) / (n - 1)
        return target.distance(centre + shift, covariance)

    return draw


def _minds(comparison: Comparison, metric: Metric) -> Callable[[np.random.Generator], float]:
    """A function that draws one MIND, by resampling the rows of the samples that were compared."""
    resampled = Resampled(*comparison.mind_sides(metric.space))

    def draw(generator: np.random.Generator) -> float:
        return resampled.distance(_counts(generator, comparison.mind_rows(metric.kind)))

    return draw


def _cmmds(comparison: Comparison, kind: str, resamples: int) -> np.ndarray:
    """Replicates of CMMD, all of them in one pass over the kernel."""
    reference, samples = comparison.reference.points[kind], comparison.samples.kept[kind]
    drawn = [_counts(keyed_generator(0, Stream.BOOTSTRAP, number), len(samples)) for number in range(resamples)]
    return cmmd_replicates(reference, samples, torch.from_numpy(np.stack(drawn, axis=1))).numpy()


def _counts(generator: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n samples is drawn when n are drawn with replacement, (n,)."""
    return np.bincount(generator.integers(n, size=n), minlength=n)


def _scores(probabilities: Tensor) -> Callable[[np.random.Generator], float]:
    """A function that draws one inception score, by resampling rows within each chunk."""

    def draw(generator: np.random.Generator) -> float:
        sums = InceptionScoreSums(probabilities.shape[1])
        for first in range(0, len(probabilities), IS_CHUNK):
            chunk = probabilities[first : first + IS_CHUNK]
            sums.update(chunk[torch.from_numpy(generator.integers(len(chunk), size=len(chunk)))], first)
        return sums.score()

    return draw


def _shares(inside: Tensor, resamples: int) -> np.ndarray:
    """Replicates of a share of points: the number inside, of n points drawn with replacement, is binomial."""
    generator = keyed_generator(0, Stream.BOOTSTRAP, 0)
    return generator.binomial(len(inside), float(inside.double().mean()), size=resamples) / len(inside)


def _kid_error(comparison: Comparison, name: str, kind: str) -> float:
    """Standard error from the spread between subsets: for their mean (first term) and for all samples (second)."""
    count = min(comparison.samples.count, len(comparison.reference.points[kind]))
    return comparison.values[f"{name}_std"] * (1 / KID_SUBSETS + comparison.kernel_subset(kind) / count) ** 0.5


def around(value: float, drawn: np.ndarray) -> dict[str, float]:
    """The spread of replicates, shifted to have the value as their mean."""
    low, high = np.percentile(drawn - drawn.mean(), COVERAGE)
    return {"std": float(drawn.std(ddof=1)), "low": value + float(low), "high": value + float(high)}


def _normal(value: float, std: float) -> dict[str, float]:
    return {"std": std, "low": value - 1.96 * std, "high": value + 1.96 * std}
