"""The tables in LaTeX, for any engine; the file is for \\input in a document that loads booktabs and graphicx."""

import re
from collections.abc import Iterable

from sit_atconv.study.report.contents import Contents
from sit_atconv.study.report.tables import Quantity, Table
from sit_atconv.study.report.texts import entry_text, row_text, shortened

_SPECIAL = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "|": "$|$", '"': r"\char34{}"},
    **{"−": "$-$", "…": r"\dots{}", "±": r"$\pm$", "×": r"$\times$", "–": r"\textendash{}"},
    **{"≤": r"$\leq$", "≥": r"$\geq$"},
    **{"↓": r"$\downarrow$", "↑": r"$\uparrow$", "[": "{[}", "]": "{]}"},
}
_NAME_LENGTH = 60
_LETTERS = re.compile(r"[À-ÏÑ-ÖØ-Ýß-ïñ-öø-ýÿ]")  # the accented letters that every engine has in its first font


def latex(contents: Contents) -> str:
    """Two tables for each budget, of results and of costs, no wider than the text."""
    parts = []
    for table in contents.tables:
        for cost in (False, True):
            if columns := [quantity for quantity in table.columns if quantity.cost == cost]:
                parts.append(_table(contents, table, columns))
    return head("report.tex") + "\n".join(parts)


def head(file: str) -> str:
    """What the document needs, as a comment at the beginning of the file of that name."""
    return rf"% \usepackage{{booktabs}} and \usepackage{{graphicx}}, then \input{{{file}}}" + "\n"


def _table(contents: Contents, table: Table, columns: list[Quantity]) -> str:
    lines = [line("row", [escaped(quantity.heading) for quantity in columns]), r"\midrule"]
    for row in table.rows:
        texts = [entry_text(table, row, quantity) for quantity in columns]
        name = escaped(shortened(row_text(table, row), _NAME_LENGTH))
        lines += [r"\addlinespace", line(name, [_bold(text.value, text.best) for text in texts])]
        for part in ("difference", "interval"):
            if any(getattr(text, part) for text in texts):
                lines.append(line("", [small(getattr(text, part), text.apart) for text in texts]))
    caption = escaped(f"{contents.study.title}. {table.title}; seeds: {table.seeds}.")
    told = [contents.table_note, *(contents.goals if any(quantity.goal for quantity in columns) else [])]
    return floating(f"{caption} {escaped(' '.join(told))}", "l" + "r" * len(columns), lines)


def floating(caption: str, columns: str, lines: Iterable[str], below: Iterable[str] = ()) -> str:
    """A table no wider than the text, of LaTeX lines; `columns` as for tabular, `below` are lines under it."""
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            *below,
            r"\end{table}",
            "",
        ]
    )


def line(name: str, cells: list[str]) -> str:
    """A line of a table, of cells that are LaTeX already."""
    return " & ".join([name, *cells]) + r" \\"


def small(text: str, bold: bool = False) -> str:
    """Text in a smaller size, nothing if it is empty."""
    return rf"{{\scriptsize {_bold(text, bold)}}}" if text else ""


def _bold(text: str, wanted: bool) -> str:
    return rf"\textbf{{{escaped(text)}}}" if wanted else escaped(text)


def escaped(text: str) -> str:
    """Text in one line; characters that old engines do not know are spelled as their code, such as U+1F600."""
    characters = "".join(_character(c) for c in " ".join(text.split()))
    return re.sub("-(?=-)", "-{}", characters)  # else two hyphens, as of an option, become a dash


def _character(c: str) -> str:
    if c in _SPECIAL:
        return _SPECIAL[c]
    return c if " " <= c <= "~" or _LETTERS.match(c) else f"U+{ord(c):04X}"
