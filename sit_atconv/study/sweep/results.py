"""The table of a sweep, the best of its points first, as Markdown and JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sit_atconv.evaluation.report import Report
from sit_atconv.runtime.whole_files import write_json, write_text
from sit_atconv.study.report.markdown import escaped, rows_under
from sit_atconv.study.report.tables import score_quantity
from sit_atconv.study.report.texts import MISSING
from sit_atconv.study.sweep.grid import Point
from sit_atconv.study.table.calls import Calls
from sit_atconv.study.table.contents import columns_of, interval_text, value_text


@dataclass(frozen=True)
class Row:
    """A point, its report, and the calls of networks for one of its samples (None: they differ)."""

    point: Point
    report: Report
    calls: Calls | None


@dataclass(frozen=True)
class Sweep:
    """What is written. `metric` is the report's name of the score that decides, `anew` scores the best point anew."""

    rows: Sequence[Row]
    keys: Sequence[str]
    metric: str
    about: dict[str, Any]
    command: str
    anew: str

    @property
    def title(self) -> str:
        """Of the deciding score, as it is shown."""
        return score_quantity(self.metric).title


def ranked(rows: Sequence[Row], metric: str) -> list[Row]:
    """The rows from the best to the worst score; those without one last, equal ones in the order of the grid."""

    def place(row: Row) -> float:
        value = row.report.metrics.get(metric, math.nan)
        return math.inf if math.isnan(value) else value if lower else -value

    lower = score_quantity(metric).better == "lower"
    return sorted(rows, key=place)


def write_sweep(sweep: Sweep, folder: Path) -> str:
    """Write sweep.md and sweep.json, each whole or not at all; returns the Markdown."""
    text = _markdown(sweep)
    write_json(folder / "sweep.json", _json(sweep))
    write_text(folder / "sweep.md", text)
    return text


def _markdown(sweep: Sweep) -> str:
    columns = columns_of([row.report for row in sweep.rows])
    titles = [*map(escaped, sweep.keys), *(escaped(column.heading) for column in columns), "calls of networks"]
    lines = []
    for place, row in enumerate(sweep.rows):
        values = [str(row.point.values.get(key, MISSING)) for key in sweep.keys]
        scores = [" ".join(filter(None, (value_text(row.report, c), interval_text(row.report, c)))) for c in columns]
        calls = "differ" if row.calls is None else str(row.calls.total)
        cells = [escaped(cell) for cell in (*values, *scores, calls)]
        lines.append([f"**{cell}**" for cell in cells] if place == 0 else cells)
    warnings = dict.fromkeys(warning for row in sweep.rows for warning in row.report.warnings)
    said = [
        ("best", f"{sweep.rows[0].point.name}, by {sweep.title}; rows are sorted by it."),
        ("samples", _about_samples(sweep)),
        ("optimistic", _about_choice(sweep)),
        *(("warning", warning) for warning in warnings),
        ("command", sweep.command),
    ]
    notes = "\n".join(f"* **{term}**: {escaped(text)}" for term, text in said)
    table = rows_under(titles, lines)
    return f"# Sweep of {escaped(', '.join(sweep.keys))}\n\n{table}\n\n{notes}\n\nThe best, anew:\n\n    {sweep.anew}\n"


def _about_samples(sweep: Sweep) -> str:
    count, seed = sweep.about["num_samples"], sweep.about["seed"]
    return f"{count:,} for each point, seed {seed}: the same noise and labels for all points."


def _about_choice(sweep: Sweep) -> str:
    return (
        f"the best of {len(sweep.rows)} numbers, each measured on {sweep.about['num_samples']:,} samples, makes its "
        "point look better than it is: it was chosen on the noise that it is scored with. Few samples change the "
        "distances besides. Do not publish it. Score this point with another seed and as many samples as others use; "
        "the command is below."
    )


def _json(sweep: Sweep) -> dict[str, Any]:
    """Everything unrounded, in the order of the table."""
    rows = [
        {
            "values": row.point.values,
            "settings": asdict(row.point.settings),
            "folder": row.point.name,
            "calls": row.calls and {**asdict(row.calls), "total": row.calls.total},
            **{name: getattr(row.report, name) for name in ("metrics", "intervals", "unsupported", "samples")},
        }
        for row in sweep.rows
    ]
    report = sweep.rows[0].report
    return {
        "command": sweep.command,
        "keys": list(sweep.keys),
        "metric": sweep.metric,
        "best": rows[0]["values"],
        "anew": sweep.anew,
        "rows": rows,
        "drawing": sweep.about,
        **{name: getattr(report, name) for name in ("reference", "features", "settings", "versions")},
    }
