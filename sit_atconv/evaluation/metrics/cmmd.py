"""CMMD (Jayasumana et al. 2024, arXiv 2401.09603): maximum mean discrepancy of CLIP features with a Gaussian kernel."""

from collections.abc import Iterator

from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.evaluation.metrics.distances import Array, require_pair

_SIGMA = 10.0  # width of the kernel, the paper's
_SCALE = 1000.0  # the paper's, for legible numbers
_BLOCK = 2048


def cmmd(reference: Array, samples: Array, sigma: float = _SIGMA) -> float:
    """1000 (mean k(x, x) + mean k(y, y) - 2 mean k(x, y)), k = exp(-|x - y|^2 / (2 sigma^2)), in float64.

    Features (n, d) and (m, d) are taken as they are: those of the published number are L2-normalised. The estimate is
    biased (pairs of a vector with itself count), and has no root, as in the release.

    Raises:
        InputError: for no rows, dimensions that differ, values that are not finite, or a width that is not positive.
    """
    x, y = require_pair(reference, samples)
    if not 0 < sigma < float("inf"):
        raise InputError(f"The width of CMMD's kernel must be positive and finite, not {sigma}.")
    between = sum(float(kernel.sum()) for _, _, kernel in _blocks(x, y, sigma))
    return _SCALE * (_within(x, sigma) + _within(y, sigma) - 2 * between / (len(x) * len(y)))


def cmmd_replicates(reference: Tensor, samples: Tensor, counts: Tensor, sigma: float = _SIGMA) -> Tensor:
    """CMMD for resamples: row i of the samples (m, d) is there counts[i, r] times in resample r. (r,) float64."""
    x, y = reference, samples
    weights = counts.double() / len(y)
    within, between = weights.new_zeros(counts.shape[1]), weights.new_zeros(counts.shape[1])
    for rows, columns, kernel in _blocks(y, y, sigma):
        within += (weights[rows] * (kernel @ weights[columns])).sum(0)
    for rows, _, kernel in _blocks(y, x, sigma):
        between += weights[rows].T @ kernel.sum(1) / len(x)
    return _SCALE * (_within(x, sigma) + within - 2 * between)


def _within(x: Tensor, sigma: float) -> float:
    """The mean of the kernel of x (n, d) with itself, from the blocks on and above its diagonal."""
    blocks = _blocks(x, x, sigma, above=True)
    return sum(float(kernel.sum()) * (1 if rows == columns else 2) for rows, columns, kernel in blocks) / len(x) ** 2


def _blocks(x: Tensor, y: Tensor, sigma: float, above: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """The kernel matrix of x (n, d) and y (m, d), block by block: rows, columns, values; or those `above` the diagonal,
    and on it."""
    for i in range(0, len(x), _BLOCK):
        for j in range(i if above else 0, len(y), _BLOCK):
            rows, columns = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            a, b = x[rows].double(), y[columns].double()  # never all at once, which takes twice their memory
            squares = a.square().sum(1)[:, None] + b.square().sum(1)
            distances = squares.addmm_(a, b.T, alpha=-2).clamp_min_(0)
            yield rows, columns, distances.mul_(-1 / (2 * sigma**2)).exp_()
