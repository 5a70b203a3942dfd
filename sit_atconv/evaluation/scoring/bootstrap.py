"""Bootstrap confidence intervals (Efron 1979): how much metrics vary between samples from the same model."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sit_atconv.evaluation.metrics.distances import IS_CHUNK, KID_SUBSETS, InceptionScoreSums
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
    for name, value in comparison.values.items():
        root = name.split("_")[0]
        if name.endswith("_std"):
            continue
        if root == "kid":
            result[name] = _normal(value, _kid_error(comparison, name))
        elif root in ("precision", "recall"):
            result[name] = _around(value, _shares(comparison.inside[root], resamples))
        elif root == "is":
            draw = _scores(comparison.samples.kept["probabilities"])
            result[name] = _around(value, _replicates(draw, resamples, name))
        else:
            result[name] = _around(value, _replicates(_distances(comparison, name), resamples, name))
    return result


def _replicates(draw: Callable[[np.random.Generator], float], resamples: int, name: str) -> np.ndarray:
    numbers = tqdm(range(resamples), desc=f"bootstrap of {name}", unit="resample")
    return np.array([draw(keyed_generator(0, Stream.BOOTSTRAP, number)) for number in numbers])


def _distances(comparison: Comparison, name: str) -> Callable[[np.random.Generator], float]:
    """A function that draws one Fréchet distance, from moments of weighted samples, in float32 about their mean."""
    kind = "spatial" if name == "sfid" else "pool"
    target, features = comparison.target(kind), comparison.samples.kept[kind]
    centre = comparison.samples.moments[kind].mean()

    def draw(generator: np.random.Generator) -> float:
        n, device = len(features), centre.device
        weights = torch.from_numpy(np.bincount(generator.integers(n, size=n), minlength=n).astype(np.float32))
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


def _kid_error(comparison: Comparison, name: str) -> float:
    """Standard error from the spread between subsets: for their mean (first term) and for all samples (second)."""
    count = min(comparison.samples.count, len(comparison.reference.points))
    return comparison.values[f"{name}_std"] * (1 / KID_SUBSETS + comparison.kernel_subset() / count) ** 0.5


def _around(value: float, replicates: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(replicates - replicates.mean(), COVERAGE)
    return {"std": float(replicates.std(ddof=1)), "low": value + float(low), "high": value + float(high)}


def _normal(value: float, std: float) -> dict[str, float]:
    return {"std": std, "low": value - 1.96 * std, "high": value + 1.96 * std}
