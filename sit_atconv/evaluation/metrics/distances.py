"""Fréchet distance, inception score and kernel distance, as functions of features.

Arrays are numpy or torch; sums are accumulated in float64.
"""

import math

import numpy as np
import torch
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.randomness import Stream, keyed_generator

Array = np.ndarray | Tensor

IS_CHUNK = 5000
# What rounding to float32 may do to a covariance or a distance, as a share of the largest entry, eigenvalue or term;
# statistics kept in half precision are off by ten times as much and more.
_ROUNDED = 1e-6
_TINY = torch.finfo(torch.float64).tiny  # below it, rounding is of any size
KID_SUBSETS, KID_SIZE = 100, 1000  # torch-fidelity's defaults


def require_features(array: Array, what: str) -> Tensor:
    """The features (n, d) as a tensor; `what` names them in errors.

    Raises `InputError` for another shape, no rows, or values that are not finite.
    """
    features = torch.as_tensor(array)
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(f"Expected {what} features (n, d), n >= 1; got shape {tuple(features.shape)}.")
    if not features.isfinite().all():
        raise InputError(f"The {what} features hold values that are not finite.")
    return features


def require_pair(reference: Array, samples: Array) -> tuple[Tensor, Tensor]:
    """Features of the reference (n, d) and of samples (m, d), with errors as in `require_features`."""
    x, y = require_features(reference, "reference"), require_features(samples, "sample")
    if x.shape[1] != y.shape[1]:
        raise InputError(f"Features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared.")
    return x, y


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Fréchet distance between two Gaussians (Heusel et al. 2017): means (d,), covariances (d, d).

    |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2), in float64 on the CPU. With sigma = F F^T, the
    last trace is the sum of the singular values of F1^T F2. Their squares are the eigenvalues of
    sigma1^(1/2) sigma2 sigma1^(1/2), but taking roots of eigenvalues loses half of the digits: for steep spectra the
    error would be in the second digit. Rank-deficient covariances (n < d) need no special treatment.

    Raises:
        InputError: for shapes that do not match, values that are not finite, a matrix that is not a covariance, and a
            distance that is negative beyond rounding.
    """
    return FrechetTarget(mu1, sigma1).distance(mu2, sigma2)


class FrechetTarget:
    """One side of a Fréchet distance, factored once for many distances."""

    def __init__(self, mu: Array, sigma: Array) -> None:
        self._mu, self._sigma = _gaussian(mu, sigma)
        self._factor = _factor(self._sigma)

    def distance(self, mu: Array, sigma: Array) -> float:
        """The distance to another Gaussian, see `frechet_distance`."""
        mu, sigma = _gaussian(mu, sigma)
        if mu.shape != self._mu.shape:
            raise InputError(f"Features of {len(self._mu)} and {len(mu)} dimensions cannot be compared.")
        cross = torch.linalg.svdvals(self._factor.T @ _factor(sigma)).sum()
        positive = (self._mu - mu).square().sum() + self._sigma.trace() + sigma.trace()
        return not_negative(positive, 2 * cross)


def not_negative(positive: Tensor, cross: Tensor) -> float:
    """The distance `positive` - `cross`, at least 0: rounding may give a negative number for equal Gaussians.

    Raises `InputError` when it is negative beyond rounding.
    """
    distance = positive - cross
    if distance < -_ROUNDED * positive.clamp_min(_TINY):
        raise InputError(
            f"The Fréchet distance comes out as {float(distance):.3g}, which no two Gaussians have: the small negative "
            "eigenvalues of a covariance add up. Compute the statistics again, in float64."
        )
    return float(distance.clamp_min(0))


def require_covariance(sigma: Array) -> None:
    """Raise `InputError` unless sigma (d, d) is symmetric without negative eigenvalues, up to rounding."""
    sigma = torch.as_tensor(sigma).to("cpu", torch.float64)
    _require_symmetric(sigma)
    _require_positive(torch.linalg.eigvalsh(sigma))


def _require_symmetric(sigma: Tensor) -> None:
    largest, difference = sigma.abs().max().clamp_min(_TINY), (sigma - sigma.T).abs().max()
    if difference > 10 * _ROUNDED * largest:
        raise InputError(
            f"A covariance is not symmetric: two entries that should be equal differ by {difference:.3g} (its largest "
            f"is {largest:.3g}). It is damaged, or not a covariance."
        )


def _require_positive(eigenvalues: Tensor) -> None:
    largest = eigenvalues[-1]
    if eigenvalues[0] < -_ROUNDED * largest.clamp_min(_TINY):
        raise InputError(
            f"A covariance has the negative eigenvalue {eigenvalues[0]:.3g} (its largest is {largest:.3g}): it is "
            "damaged, was kept in half precision, or is not a covariance."
        )


def _factor(sigma: Tensor) -> Tensor:
    """F with F F^T = sigma, (d, rank). Eigenvalues within rounding of zero count as zero, as in numpy's matrix_rank."""
    eigenvalues, vectors = torch.linalg.eigh(sigma)
    _require_positive(eigenvalues)
    kept = eigenvalues > eigenvalues[-1] * len(sigma) * torch.finfo(sigma.dtype).eps
    return vectors[:, kept] * eigenvalues[kept].sqrt()


def _gaussian(mu: Array, sigma: Array) -> tuple[Tensor, Tensor]:
    mu, sigma = (torch.as_tensor(x).to("cpu", torch.float64) for x in (mu, sigma))
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise InputError(f"Expected a mean (d,) and a covariance (d, d); got {tuple(mu.shape)}, {tuple(sigma.shape)}.")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise InputError("A mean or covariance holds values that are not finite (are there at least two images?).")
    _require_symmetric(sigma)
    return mu, (sigma + sigma.T) / 2


def inception_score(probabilities: Array, chunk: int = IS_CHUNK) -> float:
    """Inception score (Salimans et al. 2016) of class probabilities (n, classes), rows in file order.

    exp(mean KL(p(y|x) | p(y))) in chunks of `chunk` rows, averaged over chunks with equal weights, even if the last
    one is shorter, as in ADM. The score depends on the order of the rows.

    Raises:
        InputError: when there are no rows or a row is not a distribution.
    """
    scores = InceptionScoreSums(torch.as_tensor(probabilities).shape[1], chunk)
    scores.update(torch.as_tensor(probabilities), first=0)
    return scores.score()


class InceptionScoreSums:
    """The sums that the inception score needs, by chunk, so that rows can arrive in any split and order.

    For a chunk of n rows with mean m: mean KL = (sum of p log p) / n - sum of m log m.
    """

    def __init__(self, classes: int, chunk: int = IS_CHUNK) -> None:
        self.classes, self.chunk = classes, chunk
        self.sums: dict[int, Tensor] = {}  # chunk -> float64 (classes + 2,): sum of p, sum of p log p, rows

    def update(self, probabilities: Tensor, first: int) -> None:
        """Add rows (n, classes), the first of which is row `first` of the whole set."""
        p = probabilities.double()
        if p.ndim != 2 or p.shape[1] != self.classes or not torch.allclose(p.sum(1), p.new_ones(()), atol=1e-3):
            raise InputError(f"The inception score needs probabilities (n, {self.classes}) whose rows sum to one.")
        row = 0
        while row < len(p):
            number = (first + row) // self.chunk
            part = p[row : (number + 1) * self.chunk - first]
            sums = torch.cat([part.sum(0), torch.xlogy(part, part).sum()[None], part.new_tensor([len(part)])])
            self.sums[number] = self.sums[number] + sums if number in self.sums else sums
            row += len(part)

    def score(self) -> float:
        """The inception score of all rows so far."""
        if not self.sums:
            raise InputError("There are no images to score.")
        return sum(_chunk_score(s[:-2], s[-2], s[-1]) for _, s in sorted(self.sums.items())) / len(self.sums)


def _chunk_score(total: Tensor, entropy: Tensor, count: Tensor) -> float:
    mean = total / count
    return math.exp(float(entropy / count - torch.xlogy(mean, mean).sum()))


def kernel_distance(
    reference: Array, samples: Array, subsets: int = KID_SUBSETS, size: int = KID_SIZE, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018) of features (n, d) and (m, d): mean, standard deviation.

    Unbiased squared MMD with the kernel (x.y / d + 1)^3, on `subsets` random subsets of `size` features per side (or
    all features of a smaller side).
    """
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    size = min(size, len(reference), len(samples))
    if size < 2:
        raise InputError("A kernel distance needs at least two images on each side.")
    values = []
    for subset in range(subsets):
        generator = keyed_generator(seed, Stream.BOOTSTRAP, subset)
        x = reference[torch.from_numpy(generator.choice(len(reference), size, replace=False))].double()
        y = samples[torch.from_numpy(generator.choice(len(samples), size, replace=False))].double()
        values.append(_squared_mmd(x, y.to(x.device)))
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate for the same number of vectors x and y, (n, d)."""
    n, d = x.shape
    within_x, within_y, between = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (within_x.sum() - within_x.trace() + within_y.sum() - within_y.trace()) / (n * (n - 1))
    return float(within - 2 * between.mean())
