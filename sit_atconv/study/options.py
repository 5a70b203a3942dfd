"""The options of programs in a study's file, checked by the programs' own parsers."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError, nearest
from sit_atconv.evaluation.arguments import chosen_features
from sit_atconv.evaluation.command import parse as parse_evaluation
from sit_atconv.evaluation.features.kinds import create_features
from sit_atconv.models import SiT
from sit_atconv.sampling.arguments import add_sampling_arguments, sample_parser, split_sampling_arguments
from sit_atconv.sampling.draw import Drawing
from sit_atconv.sampling.labels import choose_labels
from sit_atconv.study.commands import option_words
from sit_atconv.study.plan import Options, Plan

# What the study itself gives to the programs
_OF_SAMPLING, _OF_SCORES = ("checkpoint", "out"), ("samples", "checkpoint", "autoencoder", "json")
_OF_AGREEMENT = ("reference", "features", "weights", "batch-size", "workers", "cache", "device", "fast")


def check_sampling(plan: Plan, model: SiT) -> int:
    """The number of samples. Raises `InputError` for options that sample.py or the model would refuse."""
    if plan.sampling is None:
        return 0
    words = _words(plan.sampling, "sampling", _OF_SAMPLING)
    given = vars(sample_parser(_refusing("sampling")).parse_args(["--checkpoint", "x", "--out", "x", *words]))
    settings, rest = split_sampling_arguments(given)
    if "weak_checkpoint" not in rest:
        Drawing(model, settings)
    choose_labels(rest.get("labels", "balanced"), range(1), model.classes, 0)
    return rest["num_samples"]


def check_scores(options: Options, what: str, size: tuple[int, int]) -> None:
    """Raise `InputError` for options that evaluate_fid.py would refuse."""
    words = ["--samples", "x", *_words(options, what, _OF_SCORES)]
    parsed = parse_evaluation(words, add_sampling_arguments, _refusing(what))
    if parsed.sampling:
        raise InputError(
            f"{what}: {', '.join(parsed.sampling)} belong to sampling: samples are drawn once, by sample.py."
        )
    require_source(parsed.reference)
    for name, path in chosen_features(parsed).items():
        if path is not None and not Path(path).is_file():
            raise InputError(f"{what}: there is no file {path} of the features' weights.")
        if name == "pixels":  # others may be large, or downloaded
            create_features(name, path, fast=parsed.fast)(torch.zeros(1, 3, *size, dtype=torch.uint8))


def check_agreement(options: Options, model: SiT, size: tuple[int, int]) -> None:
    """Raise `InputError` for options that the program of label agreement would refuse, all of which scores have too."""
    if unknown := [name for name in options if name not in _OF_AGREEMENT]:
        raise InputError(f"agreement has no option '{unknown[0]}': {nearest(unknown[0], _OF_AGREEMENT)}")
    check_scores(options, "agreement", size)
    if model.num_classes == 0:
        raise InputError("agreement needs labels, and the model is unconditional: leave agreement out.")
    if open_source(options["reference"]).labels is None:
        raise InputError(f"agreement needs labelled pictures, and {options['reference']} has no labels: leave it out.")


def require_source(name: str) -> None:
    """Raise `InputError` unless there are pictures, or a file that may also be one of statistics."""
    if not Path(name).is_file():
        open_source(name)


def _words(options: Options, what: str, given: tuple[str, ...]) -> list[str]:
    if ours := [name for name in options if name in given]:
        raise InputError(f"{what} has {ours[0]}, which the study sets itself: leave it out.")
    return option_words(options)


def _refusing(what: str) -> Callable[[str], NoReturn]:
    def refuse(message: str) -> NoReturn:
        raise InputError(f"{what}: {message}")

    return refuse
