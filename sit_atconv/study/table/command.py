"""The command `evaluate_fid.py table`: draws and scores the sets of samples of every model, and writes the table."""

import logging
import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.evaluation.arguments import SOURCES, add_scores, chosen_device, chosen_reading, chosen_scores
from sit_atconv.evaluation.evaluate import Options
from sit_atconv.evaluation.output import show
from sit_atconv.runtime.arguments import Parser
from sit_atconv.runtime.lock import locked
from sit_atconv.runtime.processes import leaving_in_order, process_state
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.whole_files import followed
from sit_atconv.sampling import sample_to_directory
from sit_atconv.sampling.arguments import add_sampling_arguments, split_sampling_arguments
from sit_atconv.sampling.settings import OF_GUIDANCE, SamplerSettings
from sit_atconv.sampling.writing.directory import SETTINGS
from sit_atconv.study.table.contents import Scored, Table
from sit_atconv.study.table.folder import Begun, begin_table, require_same_table
from sit_atconv.study.table.rows import Drawn, Set, Subject, examine, named_checkpoints
from sit_atconv.study.table.scoring import Scoring, read_report, settings_facts
from sit_atconv.study.table.writing import write_table

log = logging.getLogger(__name__)

_RESAMPLES = 100
_SCORES = "scores.json"  # beside the samples


def main(words: Sequence[str]) -> None:
    """The command; `words` are those after "table"."""
    options = _parse(words)
    with exit_on_input_error(), leaving_in_order():
        command = shlex.join(["python", "evaluate_fid.py", "table", *words])
        make_table(options, _chosen_drawing(options), command)


def make_table(options: Namespace, drawn: Drawn, command: str) -> None:
    """Draw and score what is not there yet, and write the table; on all processes.

    Raises `InputError` for what cannot be used, before anything is drawn.
    """
    state = process_state(cpu=options.device == "cpu")
    device = chosen_device(options.device, state)
    checkpoints, chosen = named_checkpoints(options.runs), chosen_scores(options, chosen_reading(options, device))
    with locked(options.out, state, "written", "--out"):
        subjects = examine(checkpoints, drawn)
        begun = _begun(subjects, drawn, chosen, options)
        if state.is_main_process:
            require_same_table(options.out, begun)
        scoring = Scoring(options, chosen, device, state)
        if state.is_main_process:
            begin_table(options.out, begun)
        state.wait_for_everyone()
        scored = [_make_set(options, drawn, scoring, subject, each) for subject in subjects for each in subject.sets]
        if state.is_main_process:
            table = Table(subjects, drawn, scored, command)
            show("\n" + write_table(table, options.out))
            log.info("The table: %s", options.out / "table.md")


def _parse(words: Sequence[str]) -> Namespace:
    parser = Parser(
        prog="evaluate_fid.py table",
        description="Draw four sets of samples of every RUN, unguided and guided, with random and with balanced "
        "labels, score them, and write DIR/table.md, table.tex and table.json. The same command continues.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a training run, checkpoint or model; NAME=RUN names its rows")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of samples, scores and the table")
    add("--reference", required=True, metavar="SOURCE", help=f"ADM's reference npz, or {SOURCES}")
    add_scores(parser, bootstrap=_RESAMPLES)
    parser.set_defaults(classes=None)
    sampling = add_sampling_arguments(parser)
    options = parser.parse_args(words)
    options.sampling = {name: vars(options)[name] for name in sampling if name in options}
    return options


def _chosen_drawing(options: Namespace) -> Drawn:
    """How samples are drawn, without and with guidance. Raises `InputError` for options that do not go together."""
    settings, rest = split_sampling_arguments(options.sampling)
    if "labels" in rest:
        raise InputError("--labels: the table has rows for random and for balanced labels. Leave the option out.")
    if rest["num_samples"] < 2:
        raise InputError(f"--num-samples must be at least 2, not {rest['num_samples']}: one sample has no covariance.")
    if options.sampling.get("guidance") == 1:
        raise InputError("--guidance 1 is no guidance: give the scale of the guided rows, such as 1.8.")
    if "weak_checkpoint" in rest and settings.guidance == 1:
        raise InputError("--weak-checkpoint is a model to guide away from: give --guidance SCALE, too.")
    if rest.get("weak_checkpoint"):
        rest["weak_checkpoint"] = followed(rest["weak_checkpoint"]).resolve()
    if "checkpoint_weights" in rest:
        rest["weights"] = rest.pop("checkpoint_weights")
    plain = SamplerSettings()
    unguided = replace(settings, **{name: getattr(plain, name) for name in OF_GUIDANCE})
    return Drawn(unguided, None if unguided == settings else settings, **rest)


def _begun(subjects: Sequence[Subject], drawn: Drawn, chosen: Options, options: Namespace) -> Begun:
    return Begun(
        checkpoints={subject.name: str(subject.checkpoint) for subject in subjects},
        drawing=drawn.to_dict(),
        scoring={
            "reference": options.reference,
            "features": options.features,
            "weights": options.weights,
            "fast": options.fast,
            **settings_facts(chosen),
        },
    )


def _make_set(options: Namespace, drawn: Drawn, scoring: Scoring, subject: Subject, chosen: Set) -> Scored | None:
    """Draw and score a set of samples unless it is there; its scores, on the main process."""
    main, folder = PartialState().is_main_process, options.out / chosen.folder
    if main:
        log.info("%s:", chosen)
    guided = {"weak_checkpoint": drawn.weak_checkpoint} if chosen.guided else {}
    sample_to_directory(
        subject.checkpoint,
        folder,
        drawn.num_samples,
        drawn.guided if chosen.guided else drawn.unguided,
        labels=chosen.labels or "balanced",
        seed=drawn.seed,
        batch_size=options.batch_size,
        weights=drawn.weights,
        vae=drawn.vae,
        **guided,
    )
    PartialState().wait_for_everyone()
    scoring.score(folder / "samples.npz", folder / _SCORES)
    if not main:
        return None
    return Scored(chosen, read_report(folder / _SCORES), read_json(folder / SETTINGS, dict))
