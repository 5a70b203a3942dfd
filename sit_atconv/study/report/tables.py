"""The tables of a study: all measured quantities of all rows, over seeds and compared with the first row."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from sit_atconv.evaluation.report import title as metric_title
from sit_atconv.study.report.statistics import Difference, Summary, is_finite, paired_difference, summarise
from sit_atconv.study.results import Cell, Study

HELDOUT = "heldout_loss"
EQUAL = {"steps": "equal steps", "seconds": "equal time"}  # budgets for people
UNITS = {"steps": "steps", "seconds": "seconds of training"}
_HIGHER_IS_BETTER = {"is", "precision", "recall", "ris", "psnr"}  # among metrics: the others are distances


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
    """

    key: str
    title: str
    value: Callable[[Cell], float | None]
    better: str | None = None
    cost: bool = False
    count: bool = False

    @property
    def heading(self) -> str:
        """The title with an arrow that points to the better side."""
        return self.title + {"lower": " ↓", "higher": " ↑", None: ""}[self.better]


@dataclass(frozen=True)
class Entry:
    """A quantity of a row. `difference` to the first row is None for the first row itself."""

    summary: Summary | None
    difference: Difference | None


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
                for quantity in table.quantities:
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
    summary = summarise(values.values())
    if first is None:
        return Entry(summary, None)
    return Entry(summary, paired_difference(values, {seed: quantity.value(cell) for seed, cell in first.items()}))


def _quantities(cells: list[Cell]) -> list[Quantity]:
    scores = dict.fromkeys(name for cell in cells for name in cell.scores if not name.endswith("_std"))
    return [
        Quantity(HELDOUT, "held-out loss", attrgetter("heldout_loss"), "lower"),
        *map(score_quantity, scores),
        Quantity("agreement", "label agreement", attrgetter("agreement"), "higher"),
        Quantity("steps", "steps", attrgetter("steps"), cost=True),
        Quantity("seconds", "training, s", attrgetter("seconds"), cost=True),
        Quantity("seconds_per_step", "s a step", attrgetter("seconds_per_step"), "lower", cost=True),
        Quantity("memory_gib", "memory, GiB", attrgetter("memory_gib"), "lower", cost=True),
        Quantity("parameters", "parameters", attrgetter("parameters"), cost=True, count=True),
        Quantity("flops", "operations", attrgetter("flops"), cost=True, count=True),
    ]


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
    return "higher" if _number_and_metric(name)[1].partition("_")[0] in _HIGHER_IS_BETTER else "lower"


def _number_and_metric(name: str) -> tuple[str, str]:
    return re.fullmatch(r"(?:(\d+)-)?(.*)", name, re.DOTALL).groups(default="")
