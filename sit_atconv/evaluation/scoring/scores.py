"""The values of the metrics."""

import torch
from torch import Tensor
from tqdm import tqdm

from sit_atconv.evaluation.features.spaces import Space
from sit_atconv.evaluation.metrics.cmmd import cmmd
from sit_atconv.evaluation.metrics.distances import KID_SIZE, FrechetTarget, kernel_distance
from sit_atconv.evaluation.metrics.neighbours import manifold_membership
from sit_atconv.evaluation.metrics.sliced import DIRECTIONS, drawn_rows, sliced_distance, unit_directions
from sit_atconv.evaluation.reading.collect import Collected
from sit_atconv.evaluation.reading.references import Reference
from sit_atconv.evaluation.scoring.choice import POINTS, Metric
from sit_atconv.randomness import Stream, keyed_generator

MIND_COUNT = 5000  # the paper's


def drawn(points: Tensor, limit: int) -> Tensor:
    """At most `limit` of the points (n, d), drawn with a keyed generator."""
    if len(points) <= limit:
        return points
    return points[torch.from_numpy(keyed_generator(0, Stream.ORDER, len(points)).permutation(len(points))[:limit])]


class Comparison:
    """Samples compared with a reference. `values`: metric -> number. `lacks`: metric -> why it cannot be computed.

    `targets` (by kind of feature), `inside` (by kind, "precision": a bool per sample, "recall": per reference point)
    and `paired` (by kind, the rows that MIND compares) are kept for the bootstrap. `floors`: metric -> MIND between two
    parts of the reference, and their size. `mind_count`: how many rows MIND compares at most.
    """

    def __init__(self, samples: Collected, reference: Reference, mind_count: int = MIND_COUNT) -> None:
        self.samples, self.reference, self.mind_count = samples, reference, mind_count
        self.values: dict[str, float] = {}
        self.lacks: dict[str, str] = {}
        self.floors: dict[str, dict[str, float]] = {}
        self.metrics: dict[str, Metric] = {}  # name of a value -> what it is
        self.targets: dict[str, FrechetTarget] = {}
        self.inside: dict[str, dict[str, Tensor]] = {}

    def compute(self, metric: Metric) -> None:
        """Compute one metric, and store it in `values`, or the reason why not in `lacks`."""
        root, name, kind = metric.root, metric.name, metric.kind
        reason = None if root == "is" else self._lack(metric)
        if reason is not None:
            self.lacks[name] = reason
        elif root == "is":
            self.values[name] = self.samples.scores[f"{metric.space.prefix}probabilities"].score()
        elif root == "kid":
            self.values[name], self.values[f"{name}_std"] = self._kernel_distance(metric.space)
        elif root in ("precision", "recall"):
            self.values[name] = float(self._membership(metric.space)[root].double().mean())
        elif root == "mind":
            name = f"mind@{self.mind_rows(kind)}{metric.space.features.suffix}"
            self.values[name], self.floors[name] = self._mind(metric.space)
        elif root == "cmmd":
            self.values[name] = cmmd(*self._points(metric.space))
        else:
            moments = self.samples.moments[kind]
            self.values[name] = self.target(kind).distance(moments.mean(), moments.covariance())
        self.metrics[name] = metric

    def target(self, kind: str) -> FrechetTarget:
        """The reference's Gaussian for a kind of feature, factored once."""
        if kind not in self.targets:
            self.targets[kind] = FrechetTarget(*self.reference.gaussians[kind])
        return self.targets[kind]

    def _lack(self, metric: Metric) -> str | None:
        """Why a metric cannot be computed; None if it can."""
        kind = "points" if metric.root in POINTS else metric.kind
        if kind in self.reference.lacks:
            return self.reference.lacks[kind]
        neighbours = metric.root in ("precision", "recall", "kid")
        fewest = metric.space.features.neighbours + 1 if neighbours else 2
        facts = self.reference.facts
        there = len(self.reference.points[metric.kind]) if kind == "points" else facts["count"] or fewest
        if min(self.samples.count, there) < fewest:
            return f"it needs at least {fewest} images on each side"
        return None

    def _points(self, space: Space) -> tuple[Tensor, Tensor]:
        """Features of the reference and of the samples, on the device."""
        device = space.features.device
        return self.reference.points[space.pool].to(device), self.samples.kept[space.pool].to(device)

    def _membership(self, space: Space) -> dict[str, Tensor]:
        if space.pool not in self.inside:
            limit = space.features.neighbour_limit
            points, samples = self._points(space)
            samples = samples if space.features.name == "inception" else drawn(samples, limit)  # ADM uses all of them
            points = drawn(points, limit)
            form = "{desc}: {percentage:3.0f}% {bar} {elapsed}"
            with tqdm(total=1, desc="precision and recall", bar_format=form) as progress:
                inside = manifold_membership(points, samples, space.features.neighbours, progress.update)
            self.inside[space.pool] = dict(zip(("precision", "recall"), inside, strict=True))
        return self.inside[space.pool]

    def kernel_subset(self, kind: str) -> int:
        """Images per side in each of KID's subsets: at most 1,000, and at most half, so that subsets differ."""
        return min(KID_SIZE, min(self.samples.count, len(self.reference.points[kind])) // 2)

    def _kernel_distance(self, space: Space) -> tuple[float, float]:
        reference, samples = self._points(space)
        return kernel_distance(reference, samples, size=self.kernel_subset(space.pool))

    def mind_rows(self, kind: str) -> int:
        """How many images per side MIND compares."""
        return min(self.mind_count, self.samples.count, len(self.reference.points[kind]))

    def mind_sides(self, space: Space) -> tuple[Tensor, Tensor, Tensor]:
        """What MIND compares: features of the reference (n, d) and of the samples (n, d), and directions (k, d)."""
        count = self.mind_rows(space.pool)
        reference, samples = (side[drawn_rows(len(side))[:count]] for side in self._points(space))
        return reference, samples, unit_directions(DIRECTIONS, reference.shape[1])

    def _mind(self, space: Space) -> tuple[float, dict[str, float]]:
        """MIND, and its value between two parts of the reference, which is what the number of rows alone gives."""
        reference, samples, directions = self.mind_sides(space)
        points = self.reference.points[space.pool]
        part = min(len(reference), len(points) // 2)
        one, other = points[drawn_rows(len(points))[: 2 * part]].to(reference.device).split(part)
        floor = {"value": sliced_distance(one, other, directions), "count": part}
        return sliced_distance(reference, samples, directions), floor
