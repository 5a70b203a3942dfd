"""The command line of evaluate_fid.py, which prints a table and writes a JSON file."""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError
from sit_atconv.evaluation.arguments import (
    SOURCES,
    add_reading,
    add_scores,
    chosen_device,
    chosen_reading,
    chosen_scores,
    open_features,
)
from sit_atconv.evaluation.evaluate import SampleStream, evaluate
from sit_atconv.evaluation.output import show
from sit_atconv.evaluation.reading.writing import write_reference
from sit_atconv.evaluation.reconstruction import score_autoencoder
from sit_atconv.runtime.arguments import Parser, count
from sit_atconv.runtime.launcher import asked_precision
from sit_atconv.runtime.processes import process_state
from sit_atconv.runtime.whole_files import make_folder_of

log = logging.getLogger(__name__)


def parse(
    arguments: Sequence[str],
    add_sampling: Callable[[ArgumentParser], list[str]],
    refuse: Callable[[str], NoReturn] | None = None,
) -> Namespace:
    """Parse the options of `evaluate_fid.py` or, if the first one is "reference", of `evaluate_fid.py reference`.

    `add_sampling` adds the options of --checkpoint, absent unless given, and returns their names. `refuse` is that of
    `Parser`.
    """
    if arguments and arguments[0] == "reference":
        return _reference_parser().parse_args(arguments[1:])
    parser = Parser(
        prog="evaluate_fid.py",
        description="FID, sFID, IS, precision and recall as the ADM evaluator defines them.",
        epilog="evaluate_fid.py reference SOURCE OUT.npz writes a reference file; evaluate_fid.py table RUN ... makes "
        "the table of a paper.",
        refuse=refuse,
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--samples", metavar="SOURCE", help=SOURCES)
    given.add_argument("--checkpoint", type=Path, help="draw the samples from this model during the evaluation")
    encoding = "score this autoencoder (rFID): encode and decode the pictures of --reference"
    given.add_argument("--autoencoder", metavar="VAE", help=encoding)
    parser.add_argument("--reference", required=True, metavar="SOURCE", help=f"ADM's reference npz, or {SOURCES}")
    parser.add_argument("--json", type=Path, help="write everything needed to repeat this to a file")
    add_scores(parser)
    parser.add_argument(
        "--classes", help="FID class by class: numbers or names separated by commas, or per-class for all"
    )
    sampling = add_sampling(parser)
    options = parser.parse_args(arguments)
    options.command = "evaluate"
    options.sampling = [name for name in sampling if name in options]
    return options


def run(options: Namespace, open_stream: Callable[[Namespace, torch.device], SampleStream]) -> None:
    """Run the command. `open_stream` draws the samples of --checkpoint."""
    _check(options)
    state = process_state(cpu=options.device == "cpu")
    device = chosen_device(options.device, state)
    if state.is_main_process and (precision := asked_precision()) and not options.fast:
        log.warning("The launcher's --mixed_precision %s is for training: features are computed in fp32.", precision)
    drawn = options.command == "evaluate" and options.checkpoint
    samples = open_stream(options, device) if drawn else None
    features, reading = open_features(options, device, state), chosen_reading(options, device)
    if options.command == "reference":
        facts = write_reference(options.source, options.out, features, options.images, reading)
        log.info("%s: statistics of %d images, %d of them in arr_0.", *map(facts.get, _WRITTEN))
        return
    chosen = chosen_scores(options, reading)
    if options.autoencoder:
        report = score_autoencoder(options.autoencoder, options.reference, features, chosen)
    else:
        report = evaluate(samples or options.samples, options.reference, features, chosen)
    if report is not None:
        try:
            if options.json:
                report.write_json(options.json)
        finally:  # the numbers are shown even if the disk is full
            show("\n" + report.table())


_WRITTEN = ("out", "count", "images_in_arr_0")


def _reference_parser() -> ArgumentParser:
    parser = Parser(
        prog="evaluate_fid.py reference",
        description="Write a reference file with ADM's keys, which ADM's own evaluator reads too.",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCES)
    parser.add_argument("out", metavar="OUT.npz", type=Path)
    parser.add_argument("--images", type=count, default=10_000, help="how many go into arr_0, for precision and recall")
    parser.set_defaults(command="reference")
    add_reading(parser)
    return parser


def _check(options: Namespace) -> None:
    """Find out before the work, not after it, what cannot be done."""
    if options.command == "evaluate" and not options.checkpoint and options.sampling:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in options.sampling)
        raise InputError(f"{flags}: only with --checkpoint, which draws samples; nothing is drawn here.")
    alone = options.weights[0] if len(options.weights) == 1 else None
    if (
        options.command == "evaluate"
        and options.checkpoint
        and alone
        and "=" not in alone
        and not Path(alone).is_file()
    ):
        raise InputError(
            f"--weights {alone}: there is no such file of the features' weights. To choose among the "
            "checkpoint's weights, give --checkpoint-weights."
        )
    out = options.out if options.command == "reference" else options.json
    if out is not None:
        make_folder_of(out)
    names = (options.source,) if options.command == "reference" else (options.samples, options.reference)
    for name in names:
        if name is not None and not Path(name).exists():  # digits, hf:NAME, or a typo, which would cost a download
            open_source(name, options=SourceOptions(unconditional=options.unconditional))
