"""Curves of the loss over steps or seconds: the mean over seeds, with the lowest and the highest."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sit_atconv.study.report.statistics import is_finite
from sit_atconv.study.report.tables import HELDOUT, finished
from sit_atconv.study.results import Cell, Study

Axis = Literal["step", "seconds"]
_MOST_POINTS = 400  # of a curve: more than a chart's pixels only make the page large


@dataclass(frozen=True)
class Curve:
    """Of one row: places x (n,), and over its seeds the mean, the lowest and the highest value at each."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Panel:
    """A chart: curves by row over one axis, from the cells of one budget; `quantity` is a field of `Point`."""

    axis: Axis
    budget: str
    quantity: str
    curves: dict[str, Curve]


def panels(study: Study) -> list[Panel]:
    """A panel over steps, of the runs with equal steps, and one over seconds, of those with equal time.

    Where the study has only one budget, both are of its runs. The held-out loss is drawn; the training loss is if no
    run measured the former.
    """
    cells = [cell for cell in study.cells if cell.state == "done"]
    heldout = any(is_finite(point.heldout_loss) for cell in cells for point in cell.curve)
    quantity = HELDOUT if heldout else "loss"
    found = []
    for axis, wanted in (("step", "steps"), ("seconds", "seconds")):
        budget = wanted if wanted in study.budgets else next(iter(study.budgets))
        drawn = {row: curve(finished(study, row, budget).values(), axis, quantity) for row in study.rows}
        found.append(Panel(axis, budget, quantity, {row: line for row, line in drawn.items() if line is not None}))
    return [panel for panel in found if panel.curves]


def curve(cells: Iterable[Cell], axis: Axis, quantity: str) -> Curve | None:
    """The curve of one row's runs, where all of them have values: each is interpolated linearly to a common grid.

    The grid has all the runs' own places, so that the mean of the straight lines is exact, unless they are too many.
    None if no run has finite values, or there is no place that all of them reach.
    """
    lines = [line for cell in cells if (line := _line(cell, axis, quantity))]
    if not lines:
        return None
    start, end = max(min(line) for line in lines), min(max(line) for line in lines)
    grid = np.array(sorted({x for line in lines for x in line if start <= x <= end}))
    if not len(grid):
        return None
    if len(grid) > _MOST_POINTS:
        grid = np.linspace(start, end, _MOST_POINTS)
    values = np.stack([np.interp(grid, list(line.keys()), list(line.values())) for line in lines])
    return Curve(grid, values.mean(0), values.min(0), values.max(0))


def _line(cell: Cell, axis: Axis, quantity: str) -> dict[float, float]:
    """Values by place, in the order of places, without those that are missing or not finite."""
    points = [(getattr(point, axis), getattr(point, quantity)) for point in cell.curve]
    return dict(sorted((x, y) for x, y in points if is_finite(x) and is_finite(y)))
