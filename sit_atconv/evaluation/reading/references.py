"""Reference statistics: ADM's npz files, other projects' mu/sigma files, or any source of images."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from sit_atconv.classes import Classes
from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.cache import FeatureCaches
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.features.spaces import Spaces
from sit_atconv.evaluation.metrics.moments import Moments
from sit_atconv.evaluation.reading.classes import Chosen, ClassPair, pair_classes
from sit_atconv.evaluation.reading.collect import Collected, Wanted, collect
from sit_atconv.evaluation.reading.loading import (
    load_batches,
    open_images,
    require_labels,
    require_two,
    require_two_of_each,
    share,
)
from sit_atconv.evaluation.reading.statistics import stored_names
from sit_atconv.evaluation.reading.stored import (
    Stored,
    holds_statistics,
    is_statistics,
    read_separate,
    read_statistics,
)
from sit_atconv.randomness import Stream, keyed_generator

log = logging.getLogger(__name__)


@dataclass
class Reference:
    """The reference that samples are compared with.

    gaussians: mean and covariance by kind of feature. points: by kind, features (n, d) for precision, recall, and
    distances of features themselves. halves: by kind, the moments of two random halves. classes: those to compare class
    by class. by_class: their number among the references -> pool features. lacks: kind of feature or "points" -> why it
    is missing. facts: entries of the report.
    """

    gaussians: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    points: dict[str, Tensor] = field(default_factory=dict)
    halves: dict[str, tuple[Moments, Moments]] = field(default_factory=dict)
    classes: list[ClassPair] = field(default_factory=list)
    by_class: dict[int, Tensor] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """How images are read: batch size, number of reader processes, cache of features, and whether without labels."""

    batch_size: int = 64
    workers: int = 0
    cache: str | Path | None = None
    unconditional: bool = False


def read_reference(
    path: str,
    features: Features | Sequence[Features] | Spaces,
    wanted: Wanted,
    reading: Reading | None = None,
    classes: Chosen = (),
    samples: Classes | None = None,
    statistics: Mapping[str, str] | None = None,
) -> Reference:
    """Read the reference at `path`, with those of the `wanted` statistics that it provides.

    Stored statistics (`mu` and `sigma`) are used as they are, since they come from more images than the file contains;
    the images of other sources are read on all processes, once for all features. `classes` are to be compared with
    those of the `samples`, one by one (`pair_classes`). `statistics` names files of statistics for single features, by
    the name of the features.

    Raises:
        InputError: for a reference that cannot be used, or that lacks requested labels or classes.
    """
    reading, spaces = reading or Reading(), Spaces(features)
    members = stored_names(path)
    separate = read_separate(statistics or {}, spaces)
    stored = read_statistics(path, spaces) if holds_statistics(members, spaces) else Stored()
    gaussians = {**stored.gaussians, **separate.gaussians}
    if is_statistics(path):
        _require_all(path, spaces, gaussians, members)
        if classes != ():
            raise InputError(f"{path} holds no images, so it cannot be compared class by class.")
        lacks = {**stored.lacks, "points": f"{path} holds no images (arr_0)"}
        facts = stored.facts or read_statistics(path, spaces).facts
        return _with_separate(Reference(gaussians, lacks=lacks, facts=facts), separate)
    source = open_images(path, reading.unconditional)
    missing = wanted.moments - gaussians.keys() - stored.lacks.keys()
    needed = replace(wanted, moments=frozenset(missing))
    if not stored.gaussians:
        reference = reference_of_images(source, path, spaces, needed, reading, classes, samples)
        reference.gaussians |= gaussians
        if "mu" in members:
            reference.facts["note"] = "stored statistics are Inception's: computed from the images in arr_0 instead"
        return _with_separate(reference, separate)
    reference = Reference(gaussians, lacks=stored.lacks, facts=stored.facts)
    if reference.facts["height"] is None:
        reference.facts["height"], reference.facts["width"] = source[0].image.shape[:2]
    pairs = _pairs(source, classes, samples)
    if missing or wanted.kept or wanted.halves or pairs:
        images = _from_images(source, path, spaces, needed, reading, pairs)
        reference.gaussians |= {kind: images.gaussians[kind] for kind in missing}
        reference.points, reference.halves = images.points, images.halves
        reference.classes, reference.by_class = pairs, images.by_class
        reference.facts["images_in_arr_0"] = images.facts
    if missing:
        titles = ", ".join(space.features.title for space in spaces if space.pool in missing)
        reference.facts["note"] = f"{path} has no statistics of {titles}: they are of the images in arr_0"
    return _with_separate(reference, separate)


def _require_all(path: str, spaces: Spaces, gaussians: Mapping[str, object], members: Sequence[str]) -> None:
    """Raise `InputError` unless a file without images has statistics of all spaces."""
    for space in spaces:
        if space.pool not in gaussians:
            held = "statistics of Inception features only" if "mu" in members else "no statistics of these features"
            raise InputError(f"{path} holds {held}; {space.features.title} need its images.")


def _with_separate(reference: Reference, separate: Stored) -> Reference:
    if separate.facts:
        reference.facts["statistics"] = separate.facts
    return reference


def reference_of_images(
    source: ImageSource,
    path: str,
    spaces: Spaces,
    wanted: Wanted,
    reading: Reading,
    classes: Chosen = (),
    samples: Classes | None = None,
) -> Reference:
    """The reference of a source's images, as `read_reference`, without a look at statistics stored beside them."""
    require_two(len(source), "references")
    return _from_images(source, path, spaces, wanted, reading, _pairs(source, classes, samples))


def look_at(
    source: ImageSource,
    features: Features | Spaces,
    wanted: Wanted,
    reading: Reading,
    what: str,
    rows: np.ndarray | None = None,
    half: np.ndarray | None = None,
) -> Collected:
    """`collect` over a source; each process reads its share. Features of which nothing is wanted are not computed."""
    state, spaces = PartialState(), Spaces(features).of(wanted.kinds)
    mine = share(len(source), state.process_index, state.num_processes)
    batches = load_batches(source, mine, reading.batch_size, reading.workers)
    options = {"first": mine.start, "total": len(mine), "what": what, "rows": rows, "half": half}
    if reading.cache is None:
        return collect(batches, spaces, wanted, **options)
    with FeatureCaches(reading.cache, spaces, wanted.kinds) as cache:
        collected = collect(batches, spaces, wanted, cache=cache, **options)
    log.info("%s: features of %d images were in %s, %d are new.", what, cache.hits, reading.cache, cache.misses)
    return collected


def source_facts(source: ImageSource, path: str, collected: Collected) -> dict[str, Any]:
    """Entries of the report about images: their source, number and size, and a digest of all of them."""
    return {"path": path, "kind": source.kind, "lossy": bool(source.lossy), **image_facts(collected)}


def image_facts(collected: Collected) -> dict[str, Any]:
    """Count, size, and the SHA-256 of all image digests in order, which does not depend on the storage format."""
    height, width = collected.size
    digest = hashlib.sha256(collected.digests.tobytes()).hexdigest()
    return {"count": collected.count, "height": height, "width": width, "images_sha256": digest}


def _from_images(
    source: ImageSource,
    path: str,
    spaces: Spaces,
    wanted: Wanted,
    reading: Reading,
    classes: list[ClassPair],
) -> Reference:
    """Compute a reference from its images; only the features that are needed are kept."""
    count = len(source)
    order = keyed_generator(0, Stream.ORDER, count).permutation(count)
    near = {space.pool: _first(order, space.features.neighbour_limit) for space in spaces}  # for distances of points
    chosen = [pair.theirs for pair in classes]
    rows = np.logical_or.reduce([*near.values(), np.isin(source.labels, chosen) if chosen else np.zeros(count, bool)])
    needed = Wanted(
        moments=wanted.moments | wanted.halves,
        kept=frozenset(near) if chosen else wanted.kept & near.keys(),  # nothing else is compared row by row
        halves=wanted.halves,
    )
    half = _first(order, count // 2) if wanted.halves else None
    collected = look_at(source, spaces, needed, reading, "reference", None if rows.all() else rows, half)
    gaussians = {kind: (moments.mean(), moments.covariance()) for kind, moments in collected.moments.items()}
    reference = Reference(gaussians, classes=classes, facts=source_facts(source, path, collected))
    reference.halves = {kind: (part, collected.moments[kind] - part) for kind, part in collected.halves.items()}
    reference.points = {kind: points[torch.from_numpy(near[kind][rows])] for kind, points in collected.kept.items()}
    for number in chosen:
        (points,) = collected.kept.values()
        reference.by_class[number] = points[torch.from_numpy(source.labels[rows] == number)]
    return reference


def _first(order: np.ndarray, count: int) -> np.ndarray:
    """A mask of the first `count` entries of a permutation."""
    mask = np.zeros(len(order), bool)
    mask[order[:count]] = True
    return mask


def _pairs(source: ImageSource, classes: Chosen, samples: Classes | None) -> list[ClassPair]:
    if classes == ():
        return []
    require_labels(source.labels, "references")
    pairs = pair_classes(classes, samples, source)
    require_two_of_each(source.labels, {pair.theirs: pair.title for pair in pairs}, "references")
    return pairs
