"""Improved precision and recall (Kynkäänniemi et al. 2019), computed on blocks of the distance matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.grouping import full_precision
from sit_atconv.evaluation.metrics.distances import Array

_BLOCK = 2048  # rows and columns of a distance block: 16 MiB in float32, which fits in caches


def precision_recall(reference: Array, samples: Array, k: int = 3) -> tuple[float, float]:
    """Precision and recall of samples (m, d) against a reference (n, d), as in the ADM evaluator, in float32.

    A point's ball extends to its k-th nearest other point. Precision: share of samples inside any reference ball;
    recall: share of reference points inside any sample ball.

    Raises:
        InputError: for k or fewer points on a side, dimensions that differ, or values that are not finite.
    """
    samples_inside, references_inside = manifold_membership(reference, samples, k)
    return float(samples_inside.double().mean()), float(references_inside.double().mean())


def manifold_membership(
    reference: Array, samples: Array, k: int = 3, progress: Callable[[float], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Masks of the samples (m,) inside any reference ball, and of the references (n,) inside any sample ball.

    `progress` is called with the share of all distances computed since its last call. Memory beyond the features is a
    few blocks, whatever n and m are.
    """
    reference, samples = _features(reference, "reference", k), _features(samples, "sample", k)
    if reference.shape[1] != samples.shape[1]:
        raise InputError(f"Features of {reference.shape[1]} and {samples.shape[1]} dimensions cannot be compared.")
    n, m = len(reference), len(samples)
    whole = n * n / 2 + m * m / 2 + n * m
    report = (lambda pairs: progress(pairs / whole)) if progress else lambda pairs: None
    with torch.inference_mode(), full_precision():
        reference_radii = neighbour_radii(reference, k, report)
        sample_radii = neighbour_radii(samples, k, report)
        return _inside(reference, reference_radii, samples, sample_radii, report)


def neighbour_radii(points: Tensor, k: int, report: Callable[[float], None] = lambda pairs: None) -> Tensor:
    """Squared distance of each of `points` (n, d) to its k-th nearest other point, (n,) float32.

    This is entry k of the sorted distances, which include the point itself. Each pair of blocks is computed once.
    """
    nearest = points.new_full((len(points), k + 1), float("inf"))
    squares = _squares(points)
    for i in range(0, len(points), _BLOCK):
        for j in range(i, len(points), _BLOCK):
            rows, columns = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            distances = _squared_distances(points[rows], squares[rows], points[columns], squares[columns])
            nearest[rows] = _smallest(torch.cat([nearest[rows], _smallest(distances, k + 1)], 1), k + 1)
            if j > i:
                nearest[columns] = _smallest(
                    torch.cat([nearest[columns], _smallest(distances.T.contiguous(), k + 1)], 1), k + 1
                )
            report(distances.numel() / (1 if j > i else 2))
    return nearest.amax(1)


def _inside(
    reference: Tensor, reference_radii: Tensor, samples: Tensor, sample_radii: Tensor, report: Callable[[float], None]
) -> tuple[Tensor, Tensor]:
    sample_squares, reference_squares = _squares(samples), _squares(reference)
    samples_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    references_inside = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for i in range(0, len(samples), _BLOCK):
        for j in range(0, len(reference), _BLOCK):
            rows, columns = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            distances = _squared_distances(
                samples[rows], sample_squares[rows], reference[columns], reference_squares[columns]
            )
            samples_inside[rows] |= (distances <= reference_radii[columns]).any(1)
            references_inside[columns] |= (distances <= sample_radii[rows, None]).any(0)
            report(distances.numel())
    return samples_inside, references_inside


def _squares(points: Tensor) -> Tensor:
    """|x|^2 of each of the points (n, d), without a copy of all points."""
    return torch.cat([block.square().sum(1) for block in points.split(_BLOCK)])


def _squared_distances(x: Tensor, x_squares: Tensor, y: Tensor, y_squares: Tensor) -> Tensor:
    """|x|^2 - 2 x.y + |y|^2, clamped at 0: (len(x), len(y)) float32."""
    return (x @ y.T).mul_(-2).add_(x_squares[:, None]).add_(y_squares).clamp_min_(0)


def _smallest(distances: Tensor, count: int) -> Tensor:
    """The `count` smallest entries of each row, (rows, count), or all of a shorter row."""
    return distances.topk(min(count, distances.shape[1]), dim=1, largest=False, sorted=False).values


def _features(array: Array, what: str, k: int) -> Tensor:
    features = torch.as_tensor(array).float()
    if features.ndim != 2 or len(features) <= k:
        raise InputError(
            f"Precision and recall need more than {k} {what} features (n, d); got shape {tuple(features.shape)}."
        )
    if not all(block.isfinite().all() for block in features.split(_BLOCK)):
        raise InputError(f"The {what} features hold values that are not finite.")
    return features
