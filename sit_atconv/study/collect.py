"""Collects the results of a study from what its programs have written; nothing is measured here."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.config import EvaluationConfig
from sit_atconv.config.strict_yaml import load_strict_yaml
from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.models.flops import forward_flops
from sit_atconv.models.mixers import import_plugins
from sit_atconv.runtime.reading import Finite, parse_json, read_json, understand
from sit_atconv.runtime.whole_files import followed
from sit_atconv.study.commands import cell_commands, cell_folder
from sit_atconv.study.plan import CellName, Plan
from sit_atconv.study.results import Cell, Point, Reached, Study
from sit_atconv.study.work import ERROR, machines
from sit_atconv.training.run.log import Record, read_log
from sit_atconv.training.run.measures import HELDOUT
from sit_atconv.training.watch.goals import goals_of
from sit_atconv.zoo.validate.loading import Description, create_network


@dataclass(frozen=True)
class _Run:
    """The part of a run's config.yaml that is collected."""

    evaluation: EvaluationConfig | None = None


@dataclass(frozen=True)
class _Report:
    """The part of evaluate_fid.py's JSON that is collected."""

    metrics: dict[str, Finite]


@dataclass(frozen=True)
class _Agreement:
    """The part of the JSON of sit_atconv.evaluation.agreement that is collected."""

    label_agreement: Finite


def collect(plan: Plan, folder: Path, command: str) -> Study:
    """The study as it stands, finished or not; `command` is the command line that runs it.

    Raises `InputError` for a result that cannot be read.
    """
    for row in plan.rows:
        import_plugins(plan.keys(row).get("model.plugins") or ())
    cells = list(plan.cells())
    ran_on = dict.fromkeys(machine for cell in cells for machine in machines(cell_folder(folder, cell)))
    return Study(
        title=plan.title,
        network=plan.network,
        rows=list(plan.rows),
        seeds=plan.seeds,
        budgets={budget: float(value) for budget, value in plan.budgets.given().items()},
        machine="; ".join(ran_on) or "not run yet",
        command=command,
        cells=[_cell(plan, folder, cell) for cell in cells],
    )


def _cell(plan: Plan, folder: Path, cell: CellName) -> Cell:
    at = cell_folder(folder, cell)
    commands = cell_commands(plan, folder, cell)
    error = (at / ERROR).read_text().strip() if (at / ERROR).exists() else None
    log = at / "run" / "log.jsonl"
    lines = read_log(log) if log.exists() else []
    trained = [line for line in lines if "seconds_per_step" in line]
    last = trained[-1] if trained else {}
    steps, seconds = last.get("step"), last.get("seconds")
    counted = _counted_network if plan.network == "image" else _counted
    parameters, flops = _size(followed(at / "run" / "checkpoints" / "latest") / "model" / "config.json", counted)
    grid = at / "samples" / "grid.png"
    return Cell(
        row=cell.row,
        budget=cell.budget,
        seed=cell.seed,
        state="done" if all(each.complete for each in commands) else "failed" if error else "waiting",
        error=error,
        commands=[each.line for each in commands],
        parameters=parameters,
        flops=flops,
        steps=steps,
        seconds=seconds,
        seconds_per_step=seconds / steps if seconds is not None else None,
        memory_gib=max((line["memory_gib"] for line in trained), default=None),
        heldout_loss=next((line["heldout_loss"] for line in reversed(lines) if "heldout_loss" in line), None),
        scores=_accuracies(lines) | _scores([at / f"scores-{number}.json" for number in range(len(plan.scores))]),
        agreement=_agreement(at / "agreement.json"),
        curve=curve(lines),
        grid=str(grid.relative_to(folder)) if grid.exists() else None,
        goals=_goals(at / "run" / "config.yaml", lines),
    )


def curve(lines: Sequence[Record]) -> list[Point]:
    """The curve of a run's log. Where only the held-out loss was measured, the time is interpolated."""
    known = [(line["step"], line["seconds"]) for line in lines if line.get("seconds") is not None]
    points: dict[int, dict[str, Any]] = {}
    for line in lines:
        found = {name: line[name] for name in ("loss", "heldout_loss") if line.get(name) is not None}
        if found and known:
            points.setdefault(line["step"], {"heldout_loss": None, "loss": None}).update(found)
    times = np.interp(list(points), *zip(*known, strict=True)) if points else ()
    found = [Point(step, float(time), **points[step]) for step, time in zip(points, times, strict=True)]
    return sorted(found, key=lambda point: point.step)


def _goals(path: Path, lines: Sequence[Record]) -> list[Reached]:
    """The goals that a run's configuration sets, with what its log says of them."""
    if not path.exists():
        return []
    try:
        config = understand(load_strict_yaml(path.read_text()), _Run, str(path)).evaluation
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a configuration: {' '.join(str(error).split())}.") from error
    found = []
    for goal in goals_of(config):
        epochs = [line[goal.key] for line in lines if goal.key in line]  # several if what is measured was changed
        samples = None if goal.name == HELDOUT else config.samples
        reached = epochs[-1] if epochs else None
        guided = config.guidance, config.internal_guidance
        found.append(Reached(goal.name, goal.value, reached, config.every, samples, *guided))
    return found


def _scores(paths: Sequence[Path]) -> dict[str, float]:
    """The metrics of all reports; where two have one name, with the number of the report in front."""
    reports = {n: read_json(path, _Report).metrics for n, path in enumerate(paths) if path.exists()}
    names = [name for metrics in reports.values() for name in metrics]
    return {
        name if names.count(name) == 1 else f"{number}-{name}": value
        for number, metrics in reports.items()
        for name, value in metrics.items()
    }


def _accuracies(lines: Sequence[Record]) -> dict[str, float]:
    """Top-1 and top-5 of the last validation in a run's log, of the average and ("_raw") of the weights in training."""
    last = next((line for line in reversed(lines) if "top1" in line), {})
    return {name: value for name, value in last.items() if name.startswith("top")}


def _agreement(path: Path) -> float | None:
    return read_json(path, _Agreement).label_agreement if path.exists() else None


def _size(config: Path, counted: Callable[[str, str], tuple[int, int]]) -> tuple[int | None, int | None]:
    """Parameters of the model of a config.json, and operations of one forward pass of one latent or picture."""
    return counted(config.read_text(), str(config)) if config.exists() else (None, None)


@cache
def _counted(text: str, path: str) -> tuple[int, int]:
    with torch.device("meta"):
        model = SiT.from_config(parse_json(text, dict[str, Any], path))
    side = model.config.input_size
    height, width = (side, side) if isinstance(side, int) else side
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, forward_flops(model, (model.config.in_channels, height, width))


@cache
def _counted_network(text: str, path: str) -> tuple[int, int]:
    """Parameters of the network of a config.json, and operations of one forward pass of one picture."""
    known = parse_json(text, Description, path)
    model = create_network(known.architecture, known.num_classes, known.model_args).eval()
    shape: Any = known.pretrained_cfg.get("input_size", (3, 224, 224))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that are not counted
        model(torch.zeros(1, *shape))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()
