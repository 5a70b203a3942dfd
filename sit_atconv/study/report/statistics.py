"""Statistics over seeds: mean and standard deviation, and paired differences with their confidence interval."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_LARGEST = 1e100


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (divided by n - 1) of n numbers; `sd` is None for a single one."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of n per-seed differences, and the bounds of its confidence interval, which are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole interval is below or above 0, otherwise 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def summarise(values: Iterable[float | None]) -> Summary | None:
    """The summary of the finite numbers among `values`; None when there are none."""
    finite = [value for value in values if is_finite(value)]
    if not finite:
        return None
    return Summary(*_mean_and_sd(finite), len(finite))


def paired_difference(values: Mapping[int, float | None], first: Mapping[int, float | None]) -> Difference | None:
    """`values` minus those of the first row, over the seeds (the keys) for which both are finite; None without any.

    The interval is Student's t for the mean of the differences, as in `scipy.stats.ttest_rel`, with n - 1 degrees of
    freedom. It has width 0 where all differences are equal up to rounding.
    """
    pairs = [(value, first[seed]) for seed, value in values.items() if is_finite(value) and is_finite(first.get(seed))]
    if not pairs:
        return None
    mean, sd = _mean_and_sd([value - reference for value, reference in pairs])
    if sd is None:
        return Difference(mean, None, None, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * sd / math.sqrt(len(pairs))
    return Difference(mean, mean - half, mean + half, len(pairs))


def is_finite(value: float | None) -> bool:
    """Whether there is a number, neither NaN nor infinite; one whose square overflows counts as infinite."""
    return value is not None and abs(value) < _LARGEST  # False for NaN


def _mean_and_sd(values: list[float]) -> tuple[float, float | None]:
    if math.isclose(min(values), max(values), rel_tol=1e-12):  # equal but for the rounding of a difference
        return float(values[0]), (0.0 if len(values) > 1 else None)
    return float(np.mean(values)), float(np.std(values, ddof=1))
