"""The tables in LaTeX, for any engine; the file is for \\input in a document that loads booktabs and graphicx."""

import re

from sit_atconv.study.report.contents import Contents
from sit_atconv.study.report.tables import Table
from sit_atconv.study.report.texts import EntryText, entry_text, row_text

_HEAD = r"""% \usepackage{booktabs} and \usepackage{graphicx}, then \input{report.tex}
"""
_SPECIAL = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "|": "$|$", '"': r"\char34{}"},
    **{"−": "$-$", "±": r"$\pm$", "×": r"$\times$", "–": "--"},
    **{"↓": r"$\downarrow$", "↑": r"$\uparrow$", "[": "{[}", "]": "{]}"},
}
_LETTERS = re.compile(r"[À-ÏÑ-ÖØ-Ýß-ïñ-öø-ýÿ]")  # the accented letters that every engine has in its first font


def latex(contents: Contents) -> str:
    """A table for each budget, no wider than the text."""
    return _HEAD + "\n".join(_table(contents, table) for table in contents.tables)


def _table(contents: Contents, table: Table) -> str:
    columns = table.columns
    lines = [_line("row", [_escaped(quantity.heading) for quantity in columns]), r"\midrule"]
    for row in table.rows:
        texts = [entry_text(table, row, quantity) for quantity in columns]
        lines.append(_line(_escaped(row_text(table, row)), [_bold(text.value, text.best) for text in texts]))
        if any(text.difference for text in texts):
            lines.append(_line("", [_small(text) for text in texts]))
    caption = _escaped(f"{contents.study.title}. {table.title}; seeds: {table.seeds}.")
    meaning = _escaped(contents.table_note)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption} {meaning}}}",
            r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def _line(name: str, cells: list[str]) -> str:
    return " & ".join([name, *cells]) + r" \\"


def _small(text: EntryText) -> str:
    return rf"{{\scriptsize {_bold(text.full_difference, text.apart)}}}" if text.difference else ""


def _bold(text: str, wanted: bool) -> str:
    return rf"\textbf{{{_escaped(text)}}}" if wanted else _escaped(text)


def _escaped(text: str) -> str:
    """Text in one line; characters that old engines do not know are spelled as their code, such as U+1F600."""
    return "".join(_character(c) for c in " ".join(text.split()))


def _character(c: str) -> str:
    if c in _SPECIAL:
        return _SPECIAL[c]
    return c if " " <= c <= "~" or _LETTERS.match(c) else f"U+{ord(c):04X}"
