"""The table as Markdown, LaTeX and JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sit_atconv.runtime.whole_files import write_json, write_text
from sit_atconv.study.report.latex import escaped, floating, head, line, small
from sit_atconv.study.report.markdown import escaped as unmarked
from sit_atconv.study.report.markdown import rows_under
from sit_atconv.study.table.contents import Column, Scored, Table, interval_text, value_text
from sit_atconv.study.table.notes import digests, notes, warnings

_TITLE = "Scores of samples"
_NO_LABELS = "none"


def write_table(table: Table, folder: Path) -> str:
    """Write table.md, table.tex and table.json, each whole or not at all; returns the Markdown."""
    text = to_markdown(table)
    write_json(folder / "table.json", to_json(table))
    write_text(folder / "table.tex", to_latex(table))
    write_text(folder / "table.md", text)
    return text


def to_markdown(table: Table) -> str:
    """The table, and a list of what must be known of it."""
    titles = ["run", "guidance", "labels", *(unmarked(column.heading) for column in table.columns)]
    lines = []
    for scored in table.scored:
        words = map(unmarked, (scored.set.row, scored.set.guidance, scored.set.labels or _NO_LABELS))
        lines.append([*words, *(_in_markdown(scored, column) for column in table.columns)])
    said = [f"* **{unmarked(term)}**: {unmarked(text)}" for term, text in notes(table)]
    return f"# {_TITLE}\n\n{rows_under(titles, lines)}\n\n" + "\n".join(said) + "\n"


def _in_markdown(scored: Scored, column: Column) -> str:
    parts = filter(None, (value_text(scored.report, column), interval_text(scored.report, column)))
    return "<br>".join(map(unmarked, parts))


def to_latex(table: Table) -> str:
    """The table with booktabs, the rows of a model between lines, and the notes in small type below."""
    titles = ["guidance", "labels", *(escaped(column.heading) for column in table.columns)]
    lines = [line("run", titles)]
    for subject in table.subjects:
        name = escaped(subject.name)
        for scored in table.of(subject):
            words = [scored.set.guidance, scored.set.labels or _NO_LABELS]
            values = [escaped(value_text(scored.report, column)) for column in table.columns]
            around = [small(interval_text(scored.report, column)) for column in table.columns]
            lines += [r"\addlinespace" if not name else r"\midrule", line(name, words + values)]
            lines += [line("", ["", "", *around])] if any(around) else []
            name = ""
    said = [rf"\textbf{{{escaped(term)}}}: {escaped(text)}" for term, text in notes(table)]
    below = [
        r"\par\smallskip",
        r"\begin{minipage}{\textwidth}\scriptsize\raggedright",
        "\n\n".join(said),
        r"\end{minipage}",
    ]
    return head("table.tex") + floating(_TITLE + ".", "lll" + "r" * len(table.columns), lines, below)


def to_json(table: Table) -> dict[str, Any]:
    """Everything unrounded, with whole digests."""
    return {
        "command": table.command,
        "columns": {column.key: {"title": column.title, "decimals": column.decimals} for column in table.columns},
        "rows": [_row(scored) for scored in table.scored],
        "runs": {
            subject.name: {
                "checkpoint": str(subject.checkpoint),
                "weights": subject.weights,
                "step": subject.step,
                "autoencoder": subject.autoencoder,
                "calls": {
                    kind: count and {**asdict(count), "total": count.total} for kind, count in subject.calls.items()
                },
                "sha256": digests(table, subject),
            }
            for subject in table.subjects
        },
        "drawing": table.drawn.to_dict(),
        "warnings": warnings(table),
        "notes": [{"about": term, "text": text} for term, text in notes(table)],
    }


def _row(scored: Scored) -> dict[str, Any]:
    report = scored.report
    return {
        "run": scored.set.row,
        "guidance": scored.set.guidance,
        "labels": scored.set.labels,
        "folder": str(scored.set.folder),
        **{name: getattr(report, name) for name in ("metrics", "intervals", "unsupported", "samples", "reference")},
        **{name: getattr(report, name) for name in ("features", "settings", "versions")},
    }
