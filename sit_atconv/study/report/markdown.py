"""The report in Markdown."""

import re
from collections.abc import Iterable, Sequence

from sit_atconv.study.report.contents import Contents
from sit_atconv.study.report.tables import Table
from sit_atconv.study.report.texts import EntryText, entry_text, row_text


def markdown(contents: Contents) -> str:
    """Title, finding, a table for each budget, what is missing, definitions and the command."""
    study = contents.study
    parts = [f"# {escaped(study.title)}", *map(escaped, contents.finding)]
    for table in contents.tables:
        parts += [f"## {table.title}", _table(table)]
    parts += map(escaped, contents.goals)
    if contents.remarks:
        parts += ["## What is missing", "\n".join(f"* {escaped(remark.short)}" for remark in contents.remarks)]
    parts += ["## How the numbers came about"]
    parts += ["\n".join(f"* **{escaped(term)}**: {escaped(meaning)}" for term, meaning in contents.definitions)]
    parts += [f"Machine: {escaped(study.machine)}", "Command:", f"    {_escaped_lines(study.command)}"]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    titles = ["row", *(escaped(quantity.heading) for quantity in table.columns)]
    lines = []
    for row in table.rows:
        texts = [entry_text(table, row, quantity) for quantity in table.columns]
        lines.append([escaped(row_text(table, row)), *map(_entry, texts)])
    return rows_under(titles, lines)


def rows_under(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *lines))


def _entry(text: EntryText) -> str:
    value = _bold(text.value, text.best)
    return f"{value}<br>{_bold(text.full_difference, text.apart)}" if text.difference else value


def _bold(text: str, wanted: bool) -> str:
    return f"**{escaped(text)}**" if wanted else escaped(text)


def escaped(text: str) -> str:
    """Text as it is, in one line: none of its characters marks anything up."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(text.split()))


def _escaped_lines(text: str) -> str:
    return "\n    ".join(text.splitlines())
