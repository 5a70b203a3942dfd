"""The tables of a study: all measured quantities of all rows, over seeds and compared with the first row."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from sit_atconv.evaluation.report import title as metric_title
from sit_atconv.study.report.statistics import Difference, Summary, is_finite, paired_difference, summarise
from sit_atconv.study.results import Cell, Study
from sit_atconv.training.run.measures import HELDOUT, lower_is_better
from sit_atconv.training.watch.goals import Goal

EQUAL = {"steps": "equal steps", "seconds": "equal time"}  # budgets for people
UNITS = {"steps": "steps", "seconds": "seconds of training"}
_NEVER = math.inf  # epochs to a goal that a run has not reached


@dataclass(frozen=True)
class Quantity:
    """A column of the table.

    Args:
        key: its name in report.json.
        title: its name for people.
        value: of a cell.
        cost: whether it is what a model takes, rather than what it achieves.
        better: "lower" or "higher", None where neither is.
        count: whether it is a number of parameters or operations, the same for all seeds.
        goal: whether it is the epochs to a goal, infinite for a run that has not reached it.
    """

    key: str
    title: str
    value: Callable[[Cell], float | None]
    better: str | None = None
    cost: bool = False
    count: bool = False
    goal: bool = False

    @property
    def heading(self) -> str:
        """The title with an arrow that points to the better side."""
        return self.title + {"lower": " ↓", "higher": " ↑", None: ""}[self.better]


@dataclass(frozen=True)
class Entry:
    """A quantity of a row. `difference` to the first row is None for the first row itself.

    `reached`: of how many seeds the runs have reached a goal, and how many there are; None for other quantities. The
    summary and the difference are None unless all have: the mean of those that did would tell something else.
    """

    summary: Summary | None
    difference: Difference | None
    reached: tuple[int, int] | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table: how many seeds are done, and the entries by the key of their quantity."""

    name: str
    done: int
    entries: dict[str, Entry]


@dataclass(frozen=True)
class Table:
    """The comparison for one budget: `size` steps or seconds of training for each row and seed."""

    budget: str
    size: float
    seeds: int
    quantities: list[Quantity]
    rows: list[Row]

    @property
    def columns(self) -> list[Quantity]:
        """The quantities that a table shows: all but the budget, which is the same for all rows."""
        return [quantity for quantity in self.quantities if quantity.key != self.budget]

    @property
    def title(self) -> str:
        return f"{EQUAL[self.budget].capitalize()}: {self.size:,.10g} {UNITS[self.budget]}"


def tables(study: Study) -> list[Table]:
    """One table for each budget; quantities that no cell has are left out."""
    return [_table(study, budget) for budget in study.budgets]


def finished(study: Study, row: str, budget: str) -> dict[int, Cell]:
    """The cells of a row and a budget that are done, by seed, in the order of the study's seeds."""
    cells = {c.seed: c for c in study.cells if (c.row, c.budget, c.state) == (row, budget, "done")}
    return {seed: cells[seed] for seed in study.seeds if seed in cells}


def unfinished(study: Study) -> Iterator[tuple[str, str, int, str, str]]:
    """Row, budget, seed, state and error of every cell that is not done."""
    known = {(cell.row, cell.budget, cell.seed): cell for cell in study.cells}
    for row in study.rows:
        for budget in study.budgets:
            for seed in study.seeds:
                cell = known.get((row, budget, seed))
                if cell is None or cell.state != "done":
                    state, error = ("waiting", None) if cell is None else (cell.state, cell.error)
                    yield row, budget, seed, state, error or ""


def diverged(study: Study, compared: list[Table]) -> Iterator[tuple[str, str, int, str]]:
    """Row, budget, seed and title of every measurement that is NaN or infinite, which the tables leave out."""
    for table in compared:
        for row in table.rows:
            for seed, cell in finished(study, row.name, table.budget).items():
                for quantity in (each for each in table.quantities if not each.goal):
                    value = quantity.value(cell)
                    if value is not None and not is_finite(value):
                        yield row.name, table.budget, seed, quantity.title


def _table(study: Study, budget: str) -> Table:
    cells = {row: finished(study, row, budget) for row in study.rows}
    everyone = [cell for row in cells.values() for cell in row.values()]
    first = cells[study.rows[0]]
    measured = [q for q in _quantities(everyone) if any(q.value(cell) is not None for cell in everyone)]
    rows = [
        Row(
            name,
            len(own),
            {quantity.key: _entry(quantity, own, None if number == 0 else first) for quantity in measured},
        )
        for number, (name, own) in enumerate(cells.items())
    ]
    return Table(budget, study.budgets[budget], len(study.seeds), measured, rows)


def _entry(quantity: Quantity, own: dict[int, Cell], first: dict[int, Cell] | None) -> Entry:
    values = {seed: quantity.value(cell) for seed, cell in own.items()}
    others = {} if first is None else {seed: quantity.value(cell) for seed, cell in first.items()}
    if not quantity.goal:
        return Entry(summarise(values.values()), paired_difference(values, others))
    found = [value for value in values.values() if value is not None]
    reached = (sum(value < _NEVER for value in found), len(found)) if found else None
    if _NEVER in found:
        return Entry(None, None, reached)
    return Entry(summarise(found), None if _NEVER in others.values() else paired_difference(values, others), reached)


def _quantities(cells: list[Cell]) -> list[Quantity]:
    scores = dict.fromkeys(name for cell in cells for name in cell.scores if not name.endswith("_std"))
    goals = dict.fromkeys(Goal(goal.name, goal.value) for cell in cells for goal in cell.goals)
    return [
        Quantity(HELDOUT, "held-out loss", attrgetter("heldout_loss"), "lower"),
        *[Quantity(g.key, goal_title(g), partial(_epochs, goal=g), "lower", goal=True) for g in goals],
        *map(score_quantity, scores),
        Quantity("agreement", "label agreement", attrgetter("agreement"), "higher"),
        Quantity("steps", "steps", attrgetter("steps"), cost=True),
        Quantity("seconds", "training, s", attrgetter("seconds"), cost=True),
        Quantity("seconds_per_step", "s a step", attrgetter("seconds_per_step"), "lower", cost=True),
        Quantity("memory_gib", "memory, GiB", attrgetter("memory_gib"), "lower", cost=True),
        Quantity("parameters", "parameters", attrgetter("parameters"), cost=True, count=True),
        Quantity("flops", "operations", attrgetter("flops"), cost=True, count=True),
    ]


def goal_title(goal: Goal) -> str:
    """Such as "epochs to FID ≤ 2"."""
    name = "held-out loss" if goal.name == HELDOUT else _score_title(goal.name)
    return f"epochs to {name} {goal.sign} {goal.value:.15g}"


def _epochs(cell: Cell, goal: Goal) -> float | None:
    """The epochs to a goal, infinite if the run has not reached it; None if it has no such goal."""
    found = [each.epochs for each in cell.goals if (each.name, each.value) == (goal.name, goal.value)]
    return None if not found else _NEVER if found[0] is None else found[0]


def score_quantity(name: str) -> Quantity:
    """The column of a metric, by its name in a report of evaluate_fid.py or in a study's results."""
    return Quantity(f"scores.{name}", _score_title(name), partial(_score, name=name), _score_better(name))


def _score(cell: Cell, name: str) -> float | None:
    return cell.scores.get(name)


def _score_title(name: str) -> str:
    """As evaluate_fid.py shows it: "1-fd_pixels" -> "FD-pixels (1)"; an unknown name as it is."""
    number, metric = _number_and_metric(name)
    try:
        return metric_title(metric) + (f" ({number})" if number else "")
    except KeyError:
        return name


def _score_better(name: str) -> str:
    return "lower" if lower_is_better(_number_and_metric(name)[1]) else "higher"


def _number_and_metric(name: str) -> tuple[str, str]:
    return re.fullmatch(r"(?:(\d+)-)?(.*)", name, re.DOTALL).groups(default="")
