"""`evaluate`: compares samples with a reference, on all processes, and returns a report."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from accelerate import PartialState
from torch import Tensor

from sit_atconv.classes import Classes
from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.kinds import Features, create_features
from sit_atconv.evaluation.features.presets import FDR_DIVISORS
from sit_atconv.evaluation.features.spaces import Spaces
from sit_atconv.evaluation.reading.classes import Chosen, source_classes
from sit_atconv.evaluation.reading.collect import Collected, Wanted, collect
from sit_atconv.evaluation.reading.loading import (
    Batch,
    open_images,
    require_labels,
    require_two,
    require_two_of_each,
)
from sit_atconv.evaluation.reading.references import (
    Reading,
    Reference,
    image_facts,
    look_at,
    read_reference,
    source_facts,
)
from sit_atconv.evaluation.report import Report, features_facts, find_warnings, library_versions
from sit_atconv.evaluation.scoring.all_scores import score
from sit_atconv.evaluation.scoring.choice import FDR, choose_metrics, wanted_for
from sit_atconv.evaluation.scoring.per_class import per_class_distances
from sit_atconv.evaluation.scoring.ratios import OWN, require_divisors, require_imagenet
from sit_atconv.evaluation.scoring.scores import MIND_COUNT, Comparison

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What to compute.

    metrics: names, or None for the default metrics of the features. kid: the kernel distance as well. bootstrap: number
    of resamples for confidence intervals, 0 for none. classes: to compare class by class (`pair_classes`). mind_count:
    how many images per side MIND compares at most. divisors: of FDr, by name of the features, or "own" for those of two
    halves of the reference; None are FDr6's. statistics: files of the reference's statistics for single features, by
    their name. reading: how images are read.
    Raises `InputError` for a bootstrap of one resample, and for MIND of one image.
    """

    metrics: tuple[str, ...] | None = None
    kid: bool = False
    bootstrap: int = 0
    classes: Chosen = ()
    mind_count: int = MIND_COUNT
    divisors: Mapping[str, float] | str | None = None
    statistics: Mapping[str, str] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        if self.mind_count < 2:
            raise InputError(f"MIND compares at least two images per side, not {self.mind_count}.")
        if self.bootstrap == 1 or self.bootstrap < 0:
            raise InputError("A bootstrap needs at least two resamples (a few hundred are usual).")


@dataclass(frozen=True)
class SampleStream:
    """This process's contiguous share of samples that are drawn during the evaluation.

    batches: uint8 tensors (b, 3, H, W), or objects with such `images` and `labels`. first: number of the share's first
    sample. total: number of samples of the share. facts: entries of the report about their origin, with "path" and
    "kind". classes: those of the labels, if they are known.
    """

    batches: Iterable[Tensor | Batch]
    first: int = 0
    total: int | None = None
    facts: dict[str, Any] = field(default_factory=lambda: {"path": "a stream", "kind": "stream"})
    classes: Classes | None = None


def evaluate(
    samples: str | SampleStream | Iterable[Tensor],
    reference: str | Reference,
    features: Features | Sequence[Features] | None = None,
    options: Options | None = None,
) -> Report | None:
    """Compare samples with a reference.

    Every process calls it; the main process gets the report, the others None. Of the images nothing is kept but the
    features that the metrics need.

    Args:
        samples: a source's path or name (every process reads its share), or an iterable of images.
        reference: ADM's npz, a file of statistics, or a source of images; or the result of `read_reference_for` for
            them and these options.
        features: see `create_features`, or several of them, which see the images in one pass; None is Inception on the
            CPU with the published weights.

    Raises:
        InputError: for a source, reference or metric that cannot be used, or fewer than two images on either side.
    """
    started = time.monotonic()
    spaces, options = Spaces(features or create_features()), options or Options()
    metrics = choose_metrics(spaces, options.metrics, options.kid)
    wanted = replace(wanted_to_score(spaces, options), halves=frozenset())  # halves are of the reference
    source, classes = _opened(samples, options)  # finds a typo before an hour's work
    target = read_reference_for(reference, spaces, options, classes) if isinstance(reference, str) else reference
    if source is not None and target.classes:
        require_two_of_each(source.labels, {pair.ours: pair.title for pair in target.classes}, "samples")
    collected, facts = _look_at_samples(source, samples, spaces, wanted, options.reading)
    require_two(collected.count, "samples")
    if not PartialState().is_main_process:
        return None

    found = score(
        metrics, Comparison(collected, target, options.mind_count), spaces, options.divisors, options.bootstrap
    )
    described, *others = [features_facts(space.features) for space in spaces]
    return Report(
        metrics=found.values,
        unsupported=found.lacks,
        warnings=find_warnings(found.values, facts, target.facts, spaces, collected.labels),
        samples=facts,
        reference=target.facts,
        features=described,
        other_features=others,
        settings={**asdict(options), "processes": PartialState().num_processes},
        versions=library_versions(),
        intervals=found.intervals,
        floors=found.floors,
        ratios=found.ratios,
        per_class={} if options.classes == () else per_class_distances(collected, target, *spaces),
        seconds=round(time.monotonic() - started, 2),
    )


def read_reference_for(
    path: str, features: Features | Sequence[Features] | Spaces, options: Options, samples: Classes | None = None
) -> Reference:
    """Read the reference at `path` with everything that `evaluate` needs for these options; `samples` are the classes.

    Raises `InputError` as `wanted_to_score` and `read_reference` do, and for FDr6 of other images than ImageNet's.
    """
    spaces = Spaces(features)
    wanted = wanted_to_score(spaces, options)
    if any(metric.root == "fdr6" for metric in choose_metrics(spaces, options.metrics, options.kid)):
        require_imagenet(path, spaces, options.statistics)
    return read_reference(
        path, spaces, wanted, options.reading, options.classes, samples, statistics=options.statistics
    )


def wanted_to_score(features: Features | Sequence[Features] | Spaces, options: Options) -> Wanted:
    """What `evaluate` collects for these options.

    Raises `InputError` for metrics that the features do not have, or options that do not go together.
    """
    spaces = Spaces(features)
    metrics = choose_metrics(spaces, options.metrics, options.kid)
    require_divisors([metric.root for metric in metrics], spaces, options.divisors)
    if options.classes != () and len(spaces) > 1:
        raise InputError("A comparison class by class is in one space: give one of the features.")
    wanted = wanted_for([metric for metric in metrics if metric.space], options.classes != (), options.bootstrap > 0)
    if not any(metric.root in FDR for metric in metrics):
        return wanted
    pools = frozenset(space.pool for space in spaces if options.divisors or space.features.name in FDR_DIVISORS)
    return replace(
        wanted,
        moments=wanted.moments | pools,
        kept=wanted.kept | (pools if options.bootstrap else frozenset()),
        halves=pools if options.divisors == OWN else frozenset(),
    )


def _opened(
    samples: str | SampleStream | Iterable[Tensor], options: Options
) -> tuple[ImageSource | None, Classes | None]:
    """The source of stored samples, and the classes of the samples where they are known and needed."""
    if not isinstance(samples, str):
        return None, samples.classes if isinstance(samples, SampleStream) else None
    source = open_images(samples, options.reading.unconditional)
    require_two(len(source), "samples")
    if options.classes == ():
        return source, None
    require_labels(source.labels, "samples")
    return source, source_classes(source)


def _look_at_samples(
    source: ImageSource | None,
    samples: str | SampleStream | Iterable[Tensor],
    spaces: Spaces,
    wanted: Wanted,
    reading: Reading,
) -> tuple[Collected, dict[str, Any]]:
    """What was collected from the samples, and their entries in the report."""
    if source is not None:
        collected = look_at(source, spaces, wanted, reading, "samples")
        return collected, source_facts(source, samples, collected)
    stream = samples if isinstance(samples, SampleStream) else SampleStream(samples)
    collected = collect(
        stream.batches, spaces.of(wanted.kinds), wanted, first=stream.first, total=stream.total, what="samples"
    )
    return collected, {"lossy": False, **stream.facts, **image_facts(collected)}
