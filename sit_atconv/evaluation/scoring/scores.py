"""The metrics: their names, what each one needs, and their values."""

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from sit_atconv.errors import InputError, nearest
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.metrics.distances import KID_SIZE, FrechetTarget, kernel_distance
from sit_atconv.evaluation.metrics.neighbours import manifold_membership
from sit_atconv.evaluation.reading.collect import Collected, Wanted
from sit_atconv.evaluation.reading.references import Reference
from sit_atconv.randomness import Stream, keyed_generator


def metric_names(features: Features) -> tuple[str, ...]:
    """The default metrics of these features, by their names in reports."""
    if features.name == "inception":
        return "fid", "sfid", "is", "precision", "recall"
    return tuple(f"{metric}{features.suffix}" for metric in ("fd", "precision", "recall"))


def choose_metrics(features: Features, chosen: Iterable[str] | None, kid: bool) -> tuple[str, ...]:
    """The metrics to compute; `chosen` None means all default ones. Raises `InputError` for unknown names."""
    names = metric_names(features)
    for name in chosen or ():
        if name not in names:
            raise InputError(f"{features.title} have no metric '{name}': {nearest(name, names)}")
    extra = (f"kid{features.suffix}",) if kid else ()
    return tuple(name for name in names if chosen is None or name in chosen) + extra


def wanted_for(metrics: Iterable[str], per_class: bool = False, bootstrap: bool = False) -> Wanted:
    """What to collect from the samples for these metrics, for distances per class, and for a bootstrap."""
    roots = {name.split("_")[0] for name in metrics}
    moments, kept = set(), set()
    if roots & {"fid", "fd"}:
        moments.add("pool")
    if "sfid" in roots:
        moments.add("spatial")
    if per_class or roots & {"precision", "recall", "kid"}:
        kept.add("pool")
    if bootstrap:
        kept |= moments | ({"probabilities"} if "is" in roots else set())
    return Wanted(frozenset(moments), frozenset(kept), scores="is" in roots, labels=per_class)


def drawn(points: Tensor, limit: int) -> Tensor:
    """At most `limit` of the points (n, d), drawn with a keyed generator."""
    if len(points) <= limit:
        return points
    return points[torch.from_numpy(keyed_generator(0, Stream.ORDER, len(points)).permutation(len(points))[:limit])]


class Comparison:
    """Samples compared with a reference. `values`: metric -> number. `lacks`: metric -> why it cannot be computed.

    `targets` (by kind of feature) and `inside` ("precision": a bool per sample, "recall": per reference point) are kept
    for the bootstrap.
    """

    def __init__(self, samples: Collected, reference: Reference, features: Features) -> None:
        self.samples, self.reference, self.features = samples, reference, features
        self.values: dict[str, float] = {}
        self.lacks: dict[str, str] = {}
        self.targets: dict[str, FrechetTarget] = {}
        self.inside: dict[str, Tensor] = {}

    def compute(self, name: str) -> None:
        """Compute one metric, and store it in `values`, or the reason why not in `lacks`."""
        root = name.split("_")[0]
        kind = {"fid": "pool", "fd": "pool", "sfid": "spatial"}.get(root, "points")
        reason = None if root == "is" else self._lack(kind)
        if reason is not None:
            self.lacks[name] = reason
        elif root == "is":
            self.values[name] = self.samples.scores.score()
        elif root == "kid":
            self.values[name], self.values[f"{name}_std"] = self._kernel_distance()
        elif root in ("precision", "recall"):
            self.values[name] = float(self._membership()[root].double().mean())
        else:
            moments = self.samples.moments[kind]
            self.values[name] = self.target(kind).distance(moments.mean(), moments.covariance())

    def target(self, kind: str) -> FrechetTarget:
        """The reference's Gaussian for a kind of feature, factored once."""
        if kind not in self.targets:
            self.targets[kind] = FrechetTarget(*self.reference.gaussians[kind])
        return self.targets[kind]

    def _lack(self, kind: str) -> str | None:
        """Why a metric that needs this kind of feature, or "points", cannot be computed; None if it can."""
        if kind in self.reference.lacks:
            return self.reference.lacks[kind]
        fewest = self.features.neighbours + 1 if kind == "points" else 2
        there = len(self.reference.points) if kind == "points" else self.reference.facts["count"] or fewest
        if min(self.samples.count, there) < fewest:
            return f"it needs at least {fewest} images on each side"
        return None

    def _membership(self) -> dict[str, Tensor]:
        if not self.inside:
            limit, device = self.features.neighbour_limit, self.features.device
            samples = self.samples.kept["pool"]
            samples = samples if self.features.name == "inception" else drawn(samples, limit)  # ADM uses all of them
            points = drawn(self.reference.points, limit)
            form = "{desc}: {percentage:3.0f}% {bar} {elapsed}"
            with tqdm(total=1, desc="precision and recall", bar_format=form) as progress:
                inside = manifold_membership(
                    points.to(device), samples.to(device), self.features.neighbours, progress.update
                )
            self.inside = dict(zip(("precision", "recall"), inside, strict=True))
        return self.inside

    def kernel_subset(self) -> int:
        """Images per side in each of KID's subsets: at most 1,000, and at most half, so that subsets differ."""
        return min(KID_SIZE, min(self.samples.count, len(self.reference.points)) // 2)

    def _kernel_distance(self) -> tuple[float, float]:
        reference, samples = (x.to(self.features.device) for x in (self.reference.points, self.samples.kept["pool"]))
        return kernel_distance(reference, samples, size=self.kernel_subset())
