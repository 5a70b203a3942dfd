"""FDr (arXiv 2604.28190): the mean over spaces of the Fréchet distance, relative to that of real images.

FDr6 is its published form: six spaces, with ImageNet's training images as the reference and the distances of its
validation images as divisors. Of other data the divisors are computed from two halves of the reference.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.presets import FDR_DIVISORS
from sit_atconv.evaluation.features.spaces import Spaces
from sit_atconv.evaluation.metrics.distances import FrechetTarget
from sit_atconv.evaluation.reading.loading import open_images
from sit_atconv.evaluation.reading.statistics import read_stored, stored_names
from sit_atconv.evaluation.reading.stored import is_statistics, names_of
from sit_atconv.evaluation.scoring.bootstrap import around, distances, replicates
from sit_atconv.evaluation.scoring.scores import Comparison

OWN = "own"
_IMAGENET = 1_281_167  # training images


@dataclass(frozen=True)
class Ratio:
    """One space of FDr: the samples' distance, that of real images, and their ratio."""

    distance: float
    divisor: float
    ratio: float


def fdr_name(divisors: Mapping[str, float] | str | None) -> str:
    """The name in reports: "fdr6" with the published divisors, else "fdr_own"."""
    return "fdr6" if divisors is None else "fdr_own"


def require_divisors(metrics: Sequence[str], spaces: Spaces, divisors: Mapping[str, float] | str | None) -> None:
    """Raise `InputError` unless these features and divisors make the chosen one of "fdr6" and "fdr"."""
    names = [space.features.name for space in spaces]
    if "fdr6" in metrics:
        if divisors is not None:
            raise InputError("FDr6 has the published divisors. With others it is called FDr: --metrics fdr.")
        if lacking := [name for name in FDR_DIVISORS if name not in names]:
            raise InputError(f"FDr6 is of six features, and {', '.join(lacking)} are not there: --features fdr6.")
    if "fdr" in metrics:
        if divisors is None:
            raise InputError(
                "FDr needs its divisors: --fdr-divisors own computes them from two halves of the reference, and "
                "NAME=VALUE gives that of the features NAME."
            )
        if isinstance(divisors, Mapping) and (wrong := sorted(set(names) ^ divisors.keys())):
            raise InputError(
                f"--fdr-divisors needs one for each of the features, {', '.join(names)}: {wrong[0]} is "
                f"{'not given' if wrong[0] in names else 'none of them'}."
            )
    if divisors is not None and "fdr" not in metrics:
        raise InputError("--fdr-divisors: only with --metrics fdr, whose distances they divide.")


def require_imagenet(path: str, spaces: Spaces, statistics: Collection[str]) -> None:
    """Raise `InputError` for a reference that FDr6 cannot be of, before its images are read.

    `statistics` are the names of features that have files of their own. Statistics at `path` may leave out how many
    images they are of, as ADM's do.
    """
    members = stored_names(path)
    noted = int(read_stored(path, "count")) if "count" in members else None
    for space in spaces:
        name = space.features.name
        if name not in FDR_DIVISORS or name in statistics:
            continue
        stored = names_of(space.features)["pool"][0] in members
        count = (noted or _IMAGENET) if stored else 0 if is_statistics(path) else len(open_images(path))
        if count != _IMAGENET:
            raise InputError(
                f"FDr6 compares with the {_IMAGENET:,} training images of ImageNet, and for {name} the reference has "
                f"{count:,} images: give --statistics {name}=FILE, or the file that `evaluate_fid.py reference` writes "
                "of them. For other data there is --metrics fdr --fdr-divisors own."
            )


class Ratios:
    """FDr of a comparison. `value`: the number; `parts`: its ratios, by name of the features."""

    def __init__(self, comparison: Comparison, spaces: Spaces, divisors: Mapping[str, float] | str | None) -> None:
        self._comparison = comparison
        self._targets: dict[str, FrechetTarget] = {}
        self.parts: dict[str, Ratio] = {}
        chosen = FDR_DIVISORS if divisors is None else divisors
        for features, prefix in spaces:
            if divisors is None and features.name not in FDR_DIVISORS:
                continue
            kind, moments = f"{prefix}pool", comparison.samples.moments[f"{prefix}pool"]
            if chosen == OWN:
                one, other = comparison.reference.halves[kind]
                target = FrechetTarget(one.mean(), one.covariance())
                divisor = target.distance(other.mean(), other.covariance())
            else:
                target, divisor = comparison.target(kind), chosen[features.name]
            distance = target.distance(moments.mean(), moments.covariance())
            self._targets[kind] = target
            self.parts[features.name] = Ratio(distance, divisor, distance / divisor if divisor else math.inf)
        self.value = sum(part.ratio for part in self.parts.values()) / len(self.parts)

    def interval(self, resamples: int) -> dict[str, float]:
        """The bootstrap's interval: resample i is of the same samples in all spaces."""
        draws: list[Callable[[np.random.Generator], float]] = []
        for (kind, target), part in zip(self._targets.items(), self.parts.values(), strict=True):
            draws.append(_divided(distances(self._comparison, kind, target), part.divisor))
        shares = [replicates(draw, resamples, "FDr") for draw in draws]
        return around(self.value, np.mean(shares, axis=0))


def _divided(draw: Callable[[np.random.Generator], float], divisor: float) -> Callable[[np.random.Generator], float]:
    return lambda generator: draw(generator) / divisor
