"""The command `sample.py --sweep`: draws and scores a few samples at every point of a grid of settings."""

import logging
import shlex
from argparse import Action, Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import PartialState

from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.evaluation.arguments import SOURCES, add_scores, chosen_device, chosen_reading, chosen_scores
from sit_atconv.evaluation.output import show
from sit_atconv.evaluation.scoring.choice import choose_metrics
from sit_atconv.models.checkpoint import load_model
from sit_atconv.runtime.arguments import Parser
from sit_atconv.runtime.lock import locked
from sit_atconv.runtime.processes import leaving_in_order, process_state
from sit_atconv.runtime.whole_files import followed
from sit_atconv.sampling import open_generator, sample_to_directory
from sit_atconv.sampling.arguments import NUM_SAMPLES, add_sampling_arguments, split_sampling_arguments
from sit_atconv.sampling.labels import choose_labels
from sit_atconv.sampling.settings import SamplerSettings
from sit_atconv.study.sweep.folder import Begun, begin_sweep, require_same_sweep
from sit_atconv.study.sweep.grid import Point, parse_sweep, points, sweep_keys
from sit_atconv.study.sweep.results import Row, Sweep, ranked, write_sweep
from sit_atconv.study.table.calls import Calls, count_calls
from sit_atconv.study.table.scoring import Scoring, read_report, settings_facts
from sit_atconv.training.run.measures import find_score

log = logging.getLogger(__name__)

_SCORES = "scores.json"  # beside the samples
_OF_THE_SWEEP = {"sweep", "out", "num_samples", "seed"}  # options that the command for the best point has not, or other


def main(words: Sequence[str]) -> None:
    """The command; `words` are those after sample.py."""
    parser = _parser()
    options = parser.parse_args(words)
    with exit_on_input_error(), leaving_in_order():
        make_sweep(options, shlex.join(["python", "sample.py", *words]), parser._actions)


def _parser() -> Parser:
    parser = Parser(
        prog="sample.py --sweep",
        description="Draw a few samples with every combination of the sampler's settings that --sweep lists, score "
        "them, and write DIR/sweep.md and sweep.json, the best first. The same command continues.",
    )
    add = parser.add_argument
    keys = f"of the sampler's settings {', '.join(sweep_keys())}"
    add("--sweep", nargs="+", required=True, metavar="KEY=VALUE,…", help=keys)
    add("--checkpoint", type=Path, required=True, help="a model directory, or a checkpoint that holds one")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of samples, scores and the table")
    add("--reference", required=True, metavar="SOURCE", help=f"ADM's reference npz, or {SOURCES}")
    add_scores(parser)
    parser.set_defaults(classes=None)
    parser.set_defaults(drawing=add_sampling_arguments(parser))
    return parser


def make_sweep(options: Namespace, command: str, actions: Sequence[Action]) -> None:
    """Draw and score what is not there yet, and write the table; on all processes.

    Raises `InputError` for what cannot be used, before anything is drawn.
    """
    swept = parse_sweep(options.sweep)
    grid, drawing = _grid(options, swept)
    state = process_state(cpu=options.device == "cpu")
    device, options.checkpoint = chosen_device(options.device, state), followed(options.checkpoint).resolve()
    chosen = chosen_scores(options, chosen_reading(options, device))
    with locked(options.out, state, "written", "--out"):
        calls = _examine(options.checkpoint, grid, drawing)
        scoring_facts = {name: getattr(options, name) for name in ("reference", "features", "weights", "fast")}
        shared = {name: value for name, value in _given(options).items() if name not in swept}
        begun = Begun(str(options.checkpoint), list(swept), shared, scoring_facts | settings_facts(chosen))
        if state.is_main_process:
            require_same_sweep(options.out, begun)
        scoring = Scoring(options, chosen, device, state)
        first = choose_metrics(scoring.features, options.metrics and options.metrics[:1])[0].name
        if state.is_main_process:
            begin_sweep(options.out, begun)
        state.wait_for_everyone()
        for point in grid:
            _make_point(options, point, drawing, scoring)
        if state.is_main_process:
            reports = [read_report(options.out / point.name / _SCORES) for point in grid]
            metric = find_score(first, reports[0].metrics) or find_score(first.split("_")[0], reports[0].metrics)
            if metric is None:
                raise InputError(f"{first} could not be computed: {reports[0].unsupported.get(first, 'no number')}.")
            rows = ranked([Row(*each) for each in zip(grid, reports, calls, strict=True)], metric)
            anew = _command_for(rows[0].point.settings, options, actions)
            about = {"num_samples": drawing["num_samples"], "seed": drawing.get("seed", 0)}
            show("\n" + write_sweep(Sweep(rows, list(swept), metric, about, command, anew), options.out))
            log.info("The sweep: %s", options.out / "sweep.md")


def _given(options: Namespace) -> dict[str, Any]:
    return {name: vars(options)[name] for name in options.drawing if name in options}


def _grid(options: Namespace, swept: dict[str, list[Any]]) -> tuple[list[Point], dict[str, Any]]:
    """The points, and the other options of drawing. Raises `InputError` for options that do not go together."""
    given, names = _given(options), {field.name for field in fields(SamplerSettings)}
    others = {name: value for name, value in given.items() if name not in names or name == "precision"}
    _, drawing = split_sampling_arguments(others)
    if "num_samples" not in given:
        raise InputError("--num-samples is missing: say how many samples each point draws, such as 1000.")
    if given["num_samples"] < 2:
        raise InputError(f"--num-samples must be at least 2, not {given['num_samples']}: one sample has no covariance.")
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if name in names}
    grid = points(swept, settings)
    if "weak_checkpoint" in drawing and all(point.settings.guidance == 1 for point in grid):
        raise InputError("--weak-checkpoint is a model to guide away from: give or sweep a guidance other than 1.")
    if "checkpoint_weights" in drawing:
        drawing["weights"] = drawing.pop("checkpoint_weights")
    if len(grid) == 1:
        raise InputError(f"--sweep {' '.join(options.sweep)} is one point: give at least two values that differ.")
    return grid, drawing


def _examine(checkpoint: Path, grid: Sequence[Point], drawing: dict[str, Any]) -> list[Calls | None]:
    """The calls for a sample of each point. Raises `InputError` for a point or labels that the model cannot draw."""
    model, _ = open_generator(checkpoint, drawing.get("vae"), weights=drawing.get("weights"))
    weak = load_model(drawing["weak_checkpoint"]) if "weak_checkpoint" in drawing else None
    choose_labels(drawing.get("labels", "balanced"), range(1), model.classes, drawing.get("seed", 0))
    calls = []
    for point in grid:
        try:
            calls.append(count_calls(model, point.settings, weak if point.settings.guidance != 1 else None))
        except InputError as error:
            raise InputError(f"--sweep {point.name}: {error}") from error
    return calls


def _make_point(options: Namespace, point: Point, drawing: dict[str, Any], scoring: Scoring) -> None:
    """Draw and score a point's samples unless they are there."""
    if PartialState().is_main_process:
        log.info("%s:", point.name)
    folder, drawing = options.out / point.name, dict(drawing)
    if point.settings.guidance == 1:
        drawing.pop("weak_checkpoint", None)
    sample_to_directory(options.checkpoint, folder, settings=point.settings, batch_size=options.batch_size, **drawing)
    PartialState().wait_for_everyone()
    scoring.score(folder / "samples.npz", folder / _SCORES)


def _command_for(settings: SamplerSettings, options: Namespace, actions: Sequence[Action]) -> str:
    """The command of evaluate_fid.py that scores these settings anew, with another seed and a usual number."""
    names = {field.name for field in fields(SamplerSettings)}
    left_out = _OF_THE_SWEEP | ({"weak_checkpoint"} if settings.guidance == 1 else set())
    seed = vars(options).get("seed", 0) + 1
    words = ["python", "evaluate_fid.py", "--num-samples", NUM_SAMPLES, "--seed", seed]
    for action in actions:
        value = vars(options).get(action.dest, action.default)
        if action.dest in names:
            value, usual = getattr(settings, action.dest), getattr(SamplerSettings(), action.dest)
        elif action.dest in left_out or action.dest not in options:
            continue
        else:
            usual = action.default
        if value != usual:
            listed = value if isinstance(value, list | tuple) else [] if value is True else [value]
            words += [action.option_strings[-1], *listed]
    return shlex.join(map(str, words))
