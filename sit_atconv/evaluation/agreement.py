"""Do samples show what was asked for? `python -m sit_atconv.evaluation.agreement SAMPLES.npz --reference LABELLED`

Label agreement: the share of samples for which a classifier, fitted on features of labelled real pictures, predicts the
requested class. Its accuracy on real pictures, by cross-validation, stands beside it: the share that perfect samples
would reach, about.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sit_atconv.classes import Classes
from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.evaluation.arguments import SOURCES, add_features, chosen_device
from sit_atconv.evaluation.features.kinds import Features, create_features
from sit_atconv.evaluation.metrics.classifier import create_classifier, label_agreement
from sit_atconv.evaluation.output import show
from sit_atconv.evaluation.reading.classes import source_classes
from sit_atconv.evaluation.reading.collect import Collected, Wanted
from sit_atconv.evaluation.reading.loading import open_images
from sit_atconv.evaluation.reading.references import Reading, look_at, source_facts
from sit_atconv.evaluation.reading.stored import is_statistics
from sit_atconv.evaluation.report import features_facts
from sit_atconv.runtime.arguments import Parser
from sit_atconv.runtime.cpu import chosen_workers
from sit_atconv.runtime.processes import leaving_in_order, process_state
from sit_atconv.runtime.whole_files import make_folder_of, write_json

log = logging.getLogger(__name__)

_WANTED = Wanted(kept=frozenset({"pool"}), labels=True)


@dataclass(frozen=True)
class AgreementReport:
    """Shares are in [0, 1]. count: of the samples. classes: of the reference. The rest says what was compared."""

    label_agreement: float
    classifier_accuracy: float
    count: int
    classes: int
    samples: dict[str, object]
    reference: dict[str, object]
    features: dict[str, object]


def score_agreement(samples: str, reference: str, features: Features, reading: Reading) -> AgreementReport:
    """Score labelled samples with a classifier of the labelled pictures of a reference. Every process calls it.

    Classes are matched by name where both sides have names, and else by number.

    Raises:
        InputError: for sources that cannot be used or lack labels, a class of the samples that the reference lacks, a
            reference with one class, or with one picture of a class, and pixels of different sizes.
    """
    classifier = create_classifier()  # says before the work that scikit-learn is missing
    if is_statistics(reference):
        raise InputError(f"{reference} holds statistics: label agreement needs the reference's pictures and labels.")
    ours, theirs = (_open_labelled(path) for path in (samples, reference))
    _require_two_of_each(theirs, reference)
    numbers = _numbers(ours, theirs, samples, reference)
    _compare_sizes(ours, theirs, features)
    real = look_at(theirs, features, _WANTED, reading, "reference")
    drawn = look_at(ours, features, _WANTED, reading, "samples")
    requested = numbers[drawn.labels.numpy()]
    agreement, accuracy = label_agreement(classifier, *_rows(real), _rows(drawn)[0], requested)
    return AgreementReport(
        label_agreement=agreement,
        classifier_accuracy=accuracy,
        count=drawn.count,
        classes=len(np.unique(theirs.labels)),
        samples=source_facts(ours, samples, drawn),
        reference=source_facts(theirs, reference, real),
        features=features_facts(features),
    )


def describe(report: AgreementReport) -> str:
    """The report as text."""
    return (
        f"label agreement      {report.label_agreement:7.2%}   of {report.count} samples, {report.samples['path']}\n"
        f"classifier accuracy  {report.classifier_accuracy:7.2%}   on {report.reference['count']} real pictures of "
        f"{report.classes} classes, cross-validated, {report.reference['path']}\n"
        f"features             {report.features['title']}\n"
    )


def _open_labelled(path: str) -> ImageSource:
    source = open_images(path)
    if source.labels is None:
        raise InputError(
            f"{path} has no labels. Label agreement needs the class of every picture: arr_1 in an npz (sample.py "
            "--labels writes it), class folders, or a labelled data set."
        )
    return source


def _require_two_of_each(source: ImageSource, path: str) -> None:
    """Two pictures of each of two classes are what cross-validation needs."""
    numbers, counts = np.unique(source.labels, return_counts=True)
    if len(numbers) < 2:
        raise InputError(
            f"{path} holds pictures of {len(numbers)} class: a classifier needs at least two to tell apart."
        )
    if counts.min() < 2:
        alone = source_classes(source).titles(numbers[counts == 1].tolist())
        raise InputError(
            f"{path} holds one picture of class {alone}: a classifier that is checked on pictures it has not seen "
            "needs two of each class, and better twenty."
        )


def _numbers(ours: ImageSource, theirs: ImageSource, samples: str, reference: str) -> np.ndarray:
    """For each class of the samples, the same class's number in the reference, where it has pictures."""
    classes, known = source_classes(ours), source_classes(theirs)
    there = set(np.unique(theirs.labels).tolist())
    numbers = classes.numbers_in(known)
    missing = [number for number in np.unique(ours.labels).tolist() if numbers[number] not in there]
    if missing:
        raise InputError(
            f"{reference} has no pictures of class {classes.titles(missing)}, which {samples} holds: it has "
            f"{_summary(known, sorted(there))}. Samples and reference must be of the same classes, by name where both "
            "have names (class folders, class_names in an npz), else by number."
        )
    return np.array([-1 if number is None else number for number in numbers])


def _summary(classes: Classes, numbers: list[int]) -> str:
    return f"{len(numbers)} classes ({classes.titles(numbers)})"


def _compare_sizes(ours: ImageSource, theirs: ImageSource, features: Features) -> None:
    (h, w), (height, width) = (source[0].image.shape[:2] for source in (ours, theirs))
    if (h, w) == (height, width):
        return
    if features.name == "pixels":
        raise InputError(
            f"The samples are {w}x{h} and the reference is {width}x{height}: their pixels cannot be compared. Prepare "
            "a reference of the samples' size, or use --features inception."
        )
    log.warning("Samples are %dx%d, references %dx%d: the agreement includes resizing.", w, h, width, height)


def _rows(collected: Collected) -> tuple[np.ndarray, np.ndarray]:
    return collected.kept["pool"].numpy(), collected.labels.numpy()


def main() -> None:
    """The command."""
    parser = Parser(prog="python -m sit_atconv.evaluation.agreement", description=__doc__.split("\n")[0])
    parser.add_argument("samples", metavar="SAMPLES", help=f"with labels: {SOURCES}")
    parser.add_argument("--reference", required=True, metavar="LABELLED", help="real pictures with labels, likewise")
    parser.add_argument("--json", type=Path, metavar="FILE")
    add_features(parser)
    options = parser.parse_args()
    with exit_on_input_error(), leaving_in_order():
        if options.json:
            make_folder_of(options.json)
        state = process_state(cpu=options.device == "cpu")
        device = chosen_device(options.device, state)
        with state.main_process_first():  # it may download the weights
            features = create_features(options.features, options.weights, device, options.fast)
        reading = Reading(options.batch_size, chosen_workers(options.workers, device), options.cache)
        report = score_agreement(options.samples, options.reference, features, reading)
        if state.is_main_process:
            try:
                if options.json:
                    write_json(options.json, asdict(report))
            finally:  # the numbers are shown even if the disk is full
                show(describe(report))


if __name__ == "__main__":
    main()
