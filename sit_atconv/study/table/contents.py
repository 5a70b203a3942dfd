"""What the table says, before it is laid out as Markdown, LaTeX or JSON."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sit_atconv.evaluation.report import Report
from sit_atconv.study.report.statistics import is_finite
from sit_atconv.study.report.tables import score_quantity
from sit_atconv.study.report.texts import MISSING, fixed
from sit_atconv.study.table.rows import Drawn, Set, Subject

_DIGITS = 3  # of the smallest number of a column
_FEWEST, _MOST = 2, 6  # decimals


@dataclass(frozen=True)
class Scored:
    """A set of samples with its report, and the settings with the hashes that its folder notes."""

    set: Set
    report: Report
    drawn: dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A metric: its key in reports, its heading, and the decimals that all of its numbers are rounded to."""

    key: str
    title: str
    heading: str
    decimals: int


@dataclass(frozen=True)
class Table:
    """The models, how their samples were drawn, their scores in the order of the rows, and the command."""

    subjects: list[Subject]
    drawn: Drawn
    scored: list[Scored]
    command: str

    @cached_property
    def columns(self) -> list[Column]:
        """A column for every metric that was asked for."""
        return columns_of([scored.report for scored in self.scored])

    def of(self, subject: Subject) -> list[Scored]:
        """The rows of a model."""
        return [scored for scored in self.scored if scored.set.row == subject.name]


def columns_of(reports: Sequence[Report]) -> list[Column]:
    """A column for every metric that the reports were asked for."""
    keys = dict.fromkeys(key for report in reports for key in (*report.metrics, *report.unsupported))
    columns = []
    for key in keys:
        if not key.endswith("_std"):  # of KID over subsets; the interval says it
            quantity = score_quantity(key)
            decimals = enough_decimals(report.metrics.get(key) for report in reports)
            columns.append(Column(key, quantity.title, quantity.heading, decimals))
    return columns


def enough_decimals(values: Iterable[float | None]) -> int:
    """Decimals, from 2 to 6, that show three digits of the smallest number, zero and what is missing left aside."""
    sizes = [abs(value) for value in values if is_finite(value) and value]
    if not sizes:
        return _FEWEST
    return min(_MOST, max(_FEWEST, _DIGITS - 1 - math.floor(math.log10(min(sizes)))))


def value_text(report: Report, column: Column) -> str:
    """The rounded number of a row."""
    value = report.metrics.get(column.key)
    return MISSING if value is None else fixed(value, column.decimals)


def interval_text(report: Report, column: Column) -> str:
    """The rounded interval of a row's number: "[1.21, 1.35]"; empty if there is none."""
    interval = report.intervals.get(column.key)
    if interval is None:
        return ""
    return f"[{fixed(interval['low'], column.decimals)}, {fixed(interval['high'], column.decimals)}]"
