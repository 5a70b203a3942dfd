"""Options of evaluation that several commands have: what is computed, with which features, of which pictures."""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from sit_atconv.classes import split_labels
from sit_atconv.errors import InputError
from sit_atconv.evaluation.evaluate import Options
from sit_atconv.evaluation.features.kinds import Features, create_features
from sit_atconv.evaluation.features.presets import GROUPS, PRESETS, expand
from sit_atconv.evaluation.reading.classes import Chosen
from sit_atconv.evaluation.reading.references import Reading
from sit_atconv.evaluation.scoring.choice import needed_features
from sit_atconv.evaluation.scoring.ratios import OWN
from sit_atconv.evaluation.scoring.scores import MIND_COUNT
from sit_atconv.runtime.arguments import count, whole_number, workers
from sit_atconv.runtime.cpu import chosen_workers

_MOST_RESAMPLES = 10**6
SOURCES = "an npz, a folder or zip of pictures, a prepared data set, or digits[:train|:heldout][@resolution]"


def add_scores(parser: ArgumentParser, bootstrap: int = 0) -> None:
    """The options of what is computed, and with which features; `bootstrap` is the default number of resamples."""
    add = parser.add_argument
    names = "only these: fid sfid is precision recall kid mind fd fdd kdd cmmd fdr6 fdr"
    add("--metrics", nargs="+", metavar="NAME", help=names)
    add("--kid", action="store_true", help="the kernel inception distance too")
    resamples = f"confidence intervals from N resamples ({bootstrap} unless given)"
    add("--bootstrap", type=whole_number(0, _MOST_RESAMPLES), default=bootstrap, metavar="N", help=resamples)
    add_distances(parser)
    add_reading(parser)


def chosen_reading(options: Namespace, device: torch.device) -> Reading:
    """How images are read."""
    return Reading(options.batch_size, chosen_workers(options.workers, device), options.cache, options.unconditional)


def chosen_scores(options: Namespace, reading: Reading) -> Options:
    """What is computed, according to the options of `add_scores` and --classes."""
    return Options(
        metrics=options.metrics,
        kid=options.kid,
        bootstrap=options.bootstrap,
        classes=_classes(options.classes),
        mind_count=options.mind_count,
        divisors=_divisors(options.fdr_divisors),
        statistics=_by_name("--statistics", options.statistics),
        reading=reading,
    )


def add_reading(parser: ArgumentParser) -> None:
    """The options of several features, and of labels."""
    add_features(parser, several=True)
    parser.add_argument("--unconditional", action="store_true", help="read no labels, e.g. where they cannot be used")


def add_distances(parser: ArgumentParser) -> None:
    """The options of single metrics."""
    add = parser.add_argument
    add("--mind-count", type=whole_number(2), default=MIND_COUNT, metavar="N", help=f"images of MIND; {MIND_COUNT}")
    add(
        "--fdr-divisors",
        nargs="+",
        metavar="NAME=VALUE",
        help="of --metrics fdr, for each of the features; own computes them from two halves of the reference",
    )
    add(
        "--statistics",
        nargs="+",
        default=(),
        metavar="NAME=FILE",
        help="the reference's mu and sigma of the features NAME, from a file of their own",
    )


def add_features(parser: ArgumentParser, several: bool = False) -> None:
    """The options of features, one kind or `several`, and of reading the pictures that they are computed from."""
    add = parser.add_argument
    if several:
        names = f"inception, pixels, timm:MODEL, {', '.join([*PRESETS, *GROUPS])}; by default those of the metrics"
        add("--features", nargs="+", metavar="NAME", help=names)
        weights = "local file of the features' weights, or NAME=FILE of several features; downloaded if not given"
        add("--weights", nargs="+", default=(), metavar="[NAME=]FILE", help=weights)
    else:
        add(
            "--features",
            default="inception",
            metavar="NAME",
            help=f"inception, pixels, timm:MODEL, {', '.join(PRESETS)}",
        )
        add("--weights", type=Path, help="local file of the features' weights; downloaded if not given")
    add("--batch-size", type=count, default=64, help="for each process; does not change the numbers")
    add("--workers", type=workers, help="processes that read pictures; by default as many as help")
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="cache features of stored pictures here, and continue from them",
    )
    add("--device", help="cuda, cuda:1, cpu, ...; by default a GPU if there is one")
    add("--fast", action="store_true", help="bfloat16 features: faster on a GPU, not for publication")


def open_features(options: Namespace, device: torch.device, state: PartialState) -> list[Features]:
    """The features that the options ask for, each with its weights. All processes call it.

    Raises `InputError` as `chosen_features` does, and for weights that cannot be loaded.
    """
    files = chosen_features(options)
    with state.main_process_first():  # it may download the weights
        return [create_features(name, path, device, options.fast) for name, path in files.items()]


def chosen_features(options: Namespace) -> dict[str, str | None]:
    """The names of the features that the options ask for, and each one's file of weights, if it has one.

    Raises `InputError` for unknown features, and weights of none of them.
    """
    names = expand(options.features or needed_features(getattr(options, "metrics", None)))
    files = _weights(options.weights, names)
    return {name: files.get(name) for name in names}


def _weights(words: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The weights file of each of the features: a word may be FILE alone where there is one kind of features."""
    if len(names) == 1 and len(words) == 1 and ("=" not in words[0] or Path(words[0]).exists()):
        return {names[0]: words[0]}
    files = _by_name("--weights", words)
    if unknown := [name for name in files if name not in names]:
        raise InputError(f"--weights {unknown[0]}={files[unknown[0]]}: the features are {', '.join(names)}.")
    return files


def _by_name(flag: str, words: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, ... by name."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise InputError(f"{flag} {word}: expected NAME=VALUE, where NAME is that of the features.")
        if name in found:
            raise InputError(f"{flag}: {name} is given twice.")
        found[name] = value
    return found


def _divisors(words: Sequence[str] | None) -> dict[str, float] | str | None:
    if words is None or list(words) == [OWN]:
        return words and OWN
    found = {}
    for name, word in _by_name("--fdr-divisors", words).items():
        try:
            found[name] = float(word)
        except ValueError:
            found[name] = math.nan
        if not 0 < found[name] < math.inf:
            raise InputError(f"--fdr-divisors {name}={word}: a divisor is a number above 0.")
    return found


def chosen_device(name: str | None, state: PartialState) -> torch.device:
    """The requested device, or that of this process. Statistics are float64, which Apple's GPUs do not support."""
    try:
        device = torch.device(name or ("cpu" if state.device.type == "mps" else state.device))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"Cannot use the device '{name}' here: {str(error).splitlines()[0]}") from error
    return device


def _classes(words: str | None) -> Chosen:
    if words is None or words == "per-class":
        return () if words is None else None
    return tuple(split_labels(words))
