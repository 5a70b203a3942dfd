"""Do samples look like the requested digits? `python -m sit_atconv.evaluation.digits SAMPLES.npz`

Label agreement: the share of samples for which a classifier, fitted on all real digits, predicts the requested class.
FD-pixels: the Fréchet distance between grey pixels of samples and of held-out digits, compared with that between real
training digits and held-out digits, at equal counts. The exit code is 1 when a limit is missed.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from sit_atconv.data.digits import load_digits
from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.evaluation.metrics.classifier import create_classifier, label_agreement
from sit_atconv.evaluation.metrics.distances import frechet_distance
from sit_atconv.evaluation.metrics.moments import moments_of
from sit_atconv.evaluation.output import show
from sit_atconv.evaluation.reading.loading import open_images
from sit_atconv.randomness import Stream, keyed_generator
from sit_atconv.runtime.arguments import Parser
from sit_atconv.runtime.whole_files import make_folder_of, write_json

CLASSES = 10


@dataclass(frozen=True)
class DigitsReport:
    """Shares are in [0, 1]; distances use grey pixels in [0, 1], on `equal_count` images per side; count: samples."""

    samples: str
    count: int
    label_agreement: float
    classifier_accuracy: float
    fd_pixels: float
    fd_pixels_real: float
    fd_pixels_ratio: float
    equal_count: int
    min_agreement: float
    max_ratio: float
    passed: bool


def score_digits(path: str, min_agreement: float = 0.95, max_ratio: float = 2.0) -> DigitsReport:
    """Score generated digits in an npz: `arr_0` uint8 (n, R, R, 3), `arr_1` the requested labels.

    Raises `InputError` when they are not square labelled digits, or a class is missing.
    """
    samples, labels = _load_samples(path)
    resolution = samples.shape[1]
    real, digits = load_digits("all", resolution)
    agreement, accuracy = label_agreement(create_classifier(), _rows(real), digits, _rows(samples), labels)

    train, heldout = load_digits("train", resolution), load_digits("heldout", resolution)
    per_class = min(int(np.bincount(y, minlength=CLASSES).min()) for y in (labels, train[1], heldout[1]))
    sets = [_gaussian(_balanced(x, y, per_class)) for x, y in ((samples, labels), train, heldout)]
    ours, real = frechet_distance(*sets[0], *sets[2]), frechet_distance(*sets[1], *sets[2])
    return DigitsReport(
        samples=path,
        count=len(samples),
        label_agreement=agreement,
        classifier_accuracy=accuracy,
        fd_pixels=ours,
        fd_pixels_real=real,
        fd_pixels_ratio=ours / real,
        equal_count=CLASSES * per_class,
        min_agreement=min_agreement,
        max_ratio=max_ratio,
        passed=agreement >= min_agreement and ours / real <= max_ratio,
    )


def describe(report: DigitsReport) -> str:
    """The report as text."""
    return (
        f"label agreement   {report.label_agreement:7.2%}   at least {report.min_agreement:.0%} of {report.count} "
        f"samples (the classifier is right about {report.classifier_accuracy:.1%} of real digits)\n"
        f"FD-pixels (grey)  {report.fd_pixels:7.4f}   samples to held-out digits, {report.equal_count} each\n"
        f"                  {report.fd_pixels_real:7.4f}   real training digits to held-out digits, "
        f"{report.equal_count} each\n"
        f"ratio             {report.fd_pixels_ratio:7.2f}   at most {report.max_ratio:g}\n"
        f"{'passed' if report.passed else 'FAILED'}\n"
    )


def _load_samples(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey images (n, R, R), float64 in [0, 255], and labels (n,)."""
    source = open_images(path)
    if source.labels is None:
        raise InputError(f"{path} has no labels. Expected an npz of sample.py: arr_0 (images) and arr_1 (labels).")
    labels = np.asarray(source.labels)
    counts = np.bincount(labels, minlength=CLASSES)
    if len(counts) > CLASSES or counts.min() < 2:
        raise InputError(
            f"{path} holds {counts.tolist()} samples of classes 0, 1, …: expected 2 or more of each digit."
        )
    images = np.stack([source[i].image for i in range(len(source))])
    if images.shape[1] != images.shape[2] or images.shape[1] < 8:
        raise InputError(f"{path} holds {images.shape[2]}x{images.shape[1]} images: digits are square, 8x8 or larger.")
    return images.mean(axis=3), labels


def _rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def _balanced(images: np.ndarray, labels: np.ndarray, per_class: int) -> np.ndarray:
    """`per_class` images of each class, drawn with keyed generators."""
    chosen = []
    for digit in range(CLASSES):
        members = np.flatnonzero(labels == digit)
        chosen.append(members[keyed_generator(0, Stream.BOOTSTRAP, digit).permutation(len(members))[:per_class]])
    return images[np.sort(np.concatenate(chosen))]


def _gaussian(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    moments = moments_of(torch.from_numpy(_rows(images)))
    return moments.mean(), moments.covariance()


def main() -> None:
    """The command."""
    parser = Parser(prog="python -m sit_atconv.evaluation.digits", description=__doc__.split("\n")[0])
    parser.add_argument("samples", metavar="SAMPLES.npz")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with exit_on_input_error():
        if options.json:
            make_folder_of(options.json)
        report = score_digits(options.samples)
        if options.json:
            write_json(options.json, asdict(report))
    show(describe(report))
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
