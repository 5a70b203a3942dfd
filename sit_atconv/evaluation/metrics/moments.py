"""Mean and covariance in one pass, from float64 sums that can be added across batches and processes."""

from dataclasses import dataclass

import torch
from torch import Tensor

_GROUP = 256


@dataclass
class Moments:
    """Sums over n vectors of size d: `total` = sum of x, (d,), and `products` = sum of x x^T, (d, d), both float64.

    Vectors are added in groups of one size, so the sums have the same bits however the vectors arrive in batches. Those
    that do not fill a group wait in `rest` until `settle`.
    """

    count: int
    total: Tensor
    products: Tensor
    rest: Tensor | None = None

    @classmethod
    def zeros(cls, dimension: int, device: str | torch.device = "cpu") -> "Moments":
        """The moments of zero vectors."""
        total = torch.zeros(dimension, dtype=torch.float64, device=device)
        return cls(0, total, torch.zeros(dimension, dimension, dtype=torch.float64, device=device))

    def update(self, vectors: Tensor) -> None:
        """Add vectors (n, d) of any floating type."""
        x = vectors.to(self.total.device, torch.float64)
        x = x if self.rest is None else torch.cat([self.rest, x])
        whole = len(x) - len(x) % _GROUP
        for group in x[:whole].split(_GROUP):
            self._add(group)
        self.rest = x[whole:].clone()

    def settle(self) -> "Moments":
        """Add what waits; returns itself."""
        if self.rest is not None and len(self.rest):
            self._add(self.rest)
        self.rest = None
        return self

    def _add(self, x: Tensor) -> None:
        self.count += len(x)
        self.total += x.sum(0)
        self.products.addmm_(x.T, x)

    def __sub__(self, part: "Moments") -> "Moments":
        """The moments of the vectors that are not in `part`."""
        self.settle(), part.settle()
        return Moments(self.count - part.count, self.total - part.total, self.products - part.products)

    def mean(self) -> Tensor:
        """The mean, (d,) float64; NaN without vectors."""
        self.settle()
        return self.total / self.count

    def covariance(self) -> Tensor:
        """The covariance with n - 1 in its denominator, (d, d) float64; NaN for fewer than two vectors."""
        mean = self.mean()
        centred = self.products - self.count * torch.outer(mean, mean)
        return centred / (self.count - 1) if self.count > 1 else torch.full_like(centred, float("nan"))


def moments_of(vectors: Tensor, block: int = 4096) -> Moments:
    """The moments of vectors (n, d), block by block, since a float64 copy of all vectors may not fit in memory."""
    moments = Moments.zeros(vectors.shape[1], vectors.device)
    for part in vectors.split(block):
        moments.update(part)
    return moments.settle()
