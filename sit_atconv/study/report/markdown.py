"""The report in Markdown."""

import re

from sit_atconv.study.report.contents import Contents
from sit_atconv.study.report.tables import Table
from sit_atconv.study.report.texts import EntryText, entry_text, row_text


def markdown(contents: Contents) -> str:
    """Title, finding, a table for each budget, what is missing, definitions and the command."""
    study = contents.study
    parts = [f"# {_escaped(study.title)}", *map(_escaped, contents.finding)]
    for table in contents.tables:
        parts += [f"## {table.title}", _table(table)]
    parts += map(_escaped, contents.goals)
    if contents.remarks:
        parts += ["## What is missing", "\n".join(f"* {_escaped(remark.short)}" for remark in contents.remarks)]
    parts += ["## How the numbers came about"]
    parts += ["\n".join(f"* **{_escaped(term)}**: {_escaped(meaning)}" for term, meaning in contents.definitions)]
    parts += [f"Machine: {_escaped(study.machine)}", "Command:", f"    {_escaped_lines(study.command)}"]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    titles = ["row", *(_escaped(quantity.heading) for quantity in table.columns)]
    lines = [titles, ["---"] * len(titles)]
    for row in table.rows:
        texts = [entry_text(table, row, quantity) for quantity in table.columns]
        lines.append([_escaped(row_text(table, row)), *map(_entry, texts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _entry(text: EntryText) -> str:
    value = _bold(text.value, text.best)
    return f"{value}<br>{_bold(text.full_difference, text.apart)}" if text.difference else value


def _bold(text: str, wanted: bool) -> str:
    return f"**{_escaped(text)}**" if wanted else _escaped(text)


def _escaped(text: str) -> str:
    """Text as it is, in one line: none of its characters marks anything up."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(text.split()))


def _escaped_lines(text: str) -> str:
    return "\n    ".join(text.splitlines())
