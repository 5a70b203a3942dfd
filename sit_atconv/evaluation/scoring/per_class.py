"""The Fréchet distance class by class."""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sit_atconv.evaluation.features.spaces import Space
from sit_atconv.evaluation.metrics.distances import frechet_distance, not_negative
from sit_atconv.evaluation.metrics.moments import moments_of
from sit_atconv.evaluation.reading.collect import Collected
from sit_atconv.evaluation.reading.references import Reference


def per_class_distances(samples: Collected, reference: Reference, space: Space) -> dict[str, dict[str, Any]]:
    """Name or number of each class -> counts, and the distance between its samples and its references.

    The distance is None if a stream had fewer than two samples of a class.
    """
    result = {}
    for title, ours, theirs in tqdm(reference.classes, desc="class by class", unit="class"):
        drawn, real = samples.kept[space.pool][samples.labels == ours], reference.by_class[theirs]
        enough = len(drawn) > 1
        distance = feature_distance(drawn.to(space.features.device), real.to(space.features.device)) if enough else None
        result[title] = {"samples": len(drawn), "references": len(real), "distance": distance}
    return result


def feature_distance(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance between Gaussians fitted to features x (n, d) and y (m, d).

    With fewer vectors than dimensions, the cross term is computed as the nuclear norm of X Y^T for centred X and Y: the
    sum of the square roots of the eigenvalues of X^T X Y^T Y.
    """
    if max(len(x), len(y)) >= x.shape[1]:
        (one, other) = moments_of(x), moments_of(y)
        return frechet_distance(one.mean(), one.covariance(), other.mean(), other.covariance())
    x, y = x.double(), y.double()
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    positive = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    return not_negative(positive, 2 * cross)
