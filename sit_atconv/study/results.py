"""The results of a study: what DIR/results.json holds, and what the report reads."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.whole_files import write_json

RESULTS = "results.json"  # in the study's folder


@dataclass(frozen=True)
class Point:
    """A point of a training curve.

    Args:
        step: optimizer steps so far.
        seconds: of training so far, without evaluations, previews and checkpoints.
        heldout_loss: of the averaged weights, where it was measured at this step.
        loss: the training loss, averaged since the line of the log before.
    """

    step: int
    seconds: float
    heldout_loss: float | None
    loss: float | None


@dataclass(frozen=True)
class Reached:
    """A goal of a run, and when it was reached.

    Args:
        name, value: of the score that was to be reached; `Goal` of training says what that is.
        epochs: images seen over images to train on when the first evaluation had reached it; None if none has.
        every: steps between evaluations.
        samples: that each evaluation drew; None for a goal of the held-out loss.
        guidance, internal_guidance: of these samples, 1 for none.
    """

    name: str
    value: float
    epochs: float | None
    every: int
    samples: int | None
    guidance: float
    internal_guidance: float = 1.0


@dataclass(frozen=True)
class Cell:
    """One run of a study: a row of the comparison, a budget and a seed.

    Args:
        row, budget, seed: which cell it is; with the budget "steps" all rows train for equal steps, with "seconds" for
            equal time.
        state: "waiting" when it was not run to its end yet.
        error: why it failed, with the last lines of its log.
        commands: command lines that run it by hand, in order.
        parameters: of the model.
        flops: operations of one forward pass of one latent or picture, a multiply-add counted as two.
        steps, seconds: of training; without evaluations, previews and checkpoints.
        seconds_per_step: their ratio.
        memory_gib: the most memory that training used.
        heldout_loss: of the averaged weights after the last step.
        scores: of an image network its accuracies in percent; else metrics of the samples as evaluate_fid.py names
            them; where several entries of `scores` in the study's file give the same name, with the number of the
            entry in front: "1-fid".
        agreement: share of samples that a classifier recognises as their label.
        curve: of training, in the order of steps.
        grid: path of the grid of samples, relative to the study's folder.
        goals: of the run, which results of earlier versions lack.
    """

    row: str
    budget: Literal["steps", "seconds"]
    seed: int
    state: Literal["done", "failed", "waiting"]
    error: str | None
    commands: list[str]
    parameters: int | None
    flops: int | None
    steps: int | None
    seconds: float | None
    seconds_per_step: float | None
    memory_gib: float | None
    heldout_loss: float | None
    scores: dict[str, float]
    agreement: float | None
    curve: list[Point]
    grid: str | None
    goals: list[Reached] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """All cells of a study; the first of the `rows` is what the others are compared with.

    Args:
        budgets: the number of steps, and of seconds of training.
        machine: processor and system that collected the results.
        command: the command line of the study.
        network: what was trained, as in the plan.
    """

    title: str
    rows: list[str]
    seeds: list[int]
    budgets: dict[str, float]
    machine: str
    command: str
    cells: list[Cell]
    network: Literal["sit", "image"] = "sit"


def write_results(study: Study, folder: Path) -> None:
    """Write results.json into the study's folder, whole or not at all."""
    write_json(folder / RESULTS, asdict(study))


def read_results(folder: Path) -> Study:
    """Read results.json of a study's folder. Raises `InputError` when it is not there or not such a file."""
    return read_json(folder / RESULTS, Study, "Run the study again: python -m sit_atconv.study STUDY.yaml --out DIR")
