"""MIND (arXiv 2605.06797): a sliced Wasserstein distance of features, with few samples as stable as FID with many.

In one dimension the optimal transport between two samples of equal size pairs them in sorted order, so the distance
needs no Gaussians and no square root of a matrix.
"""

import numpy as np
import torch
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.evaluation.metrics.distances import Array, require_pair
from sit_atconv.randomness import Stream, keyed_generator

DIRECTIONS = 1000  # the paper's
_BLOCK = 256  # directions at once: 20 MB for 10,000 features


def mind(reference: Array, samples: Array, directions: int | Array = DIRECTIONS, seed: int = 0) -> float:
    """MIND of features (n, d) and (m, d): 3 d times the mean squared difference of sorted projections.

    Of the larger side, as many rows as the other has are drawn. The number is biased: it falls with the number of rows
    compared, so only values of the same number are comparable. For Gaussians whose covariances differ by a factor it is
    3 times the Fréchet distance, in the mean over directions.

    Args:
        reference, samples: features.
        directions: how many random ones; or the directions themselves, (k, d), of any length but zero.
        seed: of the directions and the rows. Another one moves a small value by about 6 % (1,000 directions).

    Raises:
        InputError: for no rows, dimensions that differ, or values that are not finite.
    """
    x, y = require_pair(reference, samples)
    count = min(len(x), len(y))
    x, y = (side[drawn_rows(len(side), seed)[:count]] if len(side) > count else side for side in (x, y))
    return sliced_distance(x, y, unit_directions(directions, x.shape[1], seed))


def sliced_distance(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """3 d times the mean over directions (k, d) and ranks of the squared difference of sorted projections, in float64.

    x and y are features (n, d), with equal n.
    """
    total = 0.0
    for part in directions.split(_BLOCK):
        total += float((projected(x, part) - projected(y, part)).square().sum())
    return 3 * x.shape[1] * total / (len(directions) * len(x))


def projected(x: Tensor, directions: Tensor) -> Tensor:
    """Projections of features (n, d) on directions (k, d), sorted for each direction: (k, n) float64."""
    return (directions.to(x.device) @ x.double().T).sort(dim=1).values


def unit_directions(directions: int | Array, dimension: int, seed: int = 0) -> Tensor:
    """`directions` random unit vectors, or those given, normalised: (k, dimension) float64."""
    if isinstance(directions, int):
        directions = keyed_generator(seed, Stream.DIRECTION, dimension).standard_normal((directions, dimension))
    vectors = torch.as_tensor(directions).double()
    if vectors.ndim != 2 or vectors.shape[1] != dimension or not len(vectors) or not vectors.norm(dim=1).min() > 0:
        raise InputError(
            f"MIND needs directions (k, {dimension}) that are not zero, k >= 1; got {tuple(vectors.shape)}."
        )
    return vectors / vectors.norm(dim=1, keepdim=True)


def drawn_rows(count: int, seed: int = 0) -> Tensor:
    """All rows of `count` in a keyed random order, (count,) int64: the first n of them are a random subset."""
    return torch.from_numpy(keyed_generator(seed, Stream.SUBSET, count).permutation(count))


class Resampled:
    """MIND between fixed features x (n, d) and features y (n, d) that are resampled, for a bootstrap.

    Projections are sorted once: resampling repeats or leaves out entries of sorted lists.
    """

    def __init__(self, x: Tensor, y: Tensor, directions: Tensor) -> None:
        self._scale = 3 * x.shape[1]
        self._x = projected(x, directions)
        self._y, self._order = (directions.to(y.device) @ y.double().T).sort(dim=1)

    def distance(self, counts: np.ndarray) -> float:
        """The distance if row i of y is there counts[i] times; the counts (n,) sum to n."""
        repeats = torch.from_numpy(counts).to(self._order.device)[self._order]
        y = self._y.flatten().repeat_interleave(repeats.flatten()).view_as(self._x)
        return self._scale * float((self._x - y).square().mean())
