"""Scores of a set of samples, computed once and kept beside the samples."""

import logging
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from sit_atconv.evaluation.arguments import open_features
from sit_atconv.evaluation.evaluate import Options, evaluate, read_reference_for
from sit_atconv.evaluation.reading.collect import Collected
from sit_atconv.evaluation.reading.loading import load_batches, open_images
from sit_atconv.evaluation.reading.references import Reading, image_facts
from sit_atconv.evaluation.report import Report, features_facts
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.whole_files import as_json

log = logging.getLogger(__name__)

_HOW = ("batch_size", "workers", "cache")  # of reading: they do not change the numbers
_DAMAGED = "Remove it, and the same command scores the samples again."


class Scoring:
    """Scores sets of samples with the same features, reference and options, on all processes.

    Raises `InputError` for features, metrics or a reference that cannot be used, before there are samples.
    """

    def __init__(self, options: Namespace, chosen: Options, device: torch.device, state: PartialState) -> None:
        self.options = chosen
        self.features = open_features(options, device, state)
        self.reference = read_reference_for(options.reference, self.features, self.options)

    def score(self, samples: Path, to: Path) -> None:
        """Score the `samples` and write the report `to` a file, unless it holds their scores already."""
        kept = [PartialState().is_main_process and self._is_kept(samples, to)]
        broadcast_object_list(kept)
        if kept[0]:
            log.info("%s: scored already.", samples.parent)
            return
        report = evaluate(str(samples), self.reference, self.features, self.options)
        if report is not None:
            report.write_json(to)

    def _is_kept(self, samples: Path, path: Path) -> bool:
        if not path.exists():
            return False
        report = read_report(path)
        mine = {
            "settings": settings_facts(self.options),
            "features": [_identity(features_facts(each)) for each in self.features],
            "reference": as_json(self.reference.facts),
        }
        theirs = {
            "settings": _lasting(report.settings),
            "features": [_identity(facts) for facts in (report.features, *report.other_features)],
            "reference": report.reference,
        }
        other = [what for what in mine if mine[what] != theirs[what]]
        if not other and report.samples.get("images_sha256") != _digest(samples, self.options.reading):
            other = ["samples"]
        if other:
            log.info("%s: scored again, for it was made with other %s.", path, " and ".join(other))
        return not other


def read_report(path: Path) -> Report:
    """A report that `Report.write_json` has written. Raises `InputError` when it is not there or no such file."""
    return read_json(path, Report, _DAMAGED)


def settings_facts(options: Options) -> dict[str, Any]:
    """The options that change the numbers, as JSON has them."""
    return _lasting(as_json(asdict(options)))


def _lasting(settings: dict[str, Any]) -> dict[str, Any]:
    reading = {name: value for name, value in settings.get("reading", {}).items() if name not in _HOW}
    return {name: value for name, value in settings.items() if name != "processes"} | {"reading": reading}


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: facts.get(name) for name in ("name", "weights_sha256", "precision", "neighbours")}


def _digest(samples: Path, reading: Reading) -> str:
    """The digest of the samples' pixels, as a report has it."""
    source = open_images(str(samples), reading.unconditional)
    batches = load_batches(source, range(len(source)), reading.batch_size, reading.workers)
    digests = np.concatenate([batch.digests for batch in batches])
    return image_facts(Collected(digests=digests, size=source[0].image.shape[:2]))["images_sha256"]
