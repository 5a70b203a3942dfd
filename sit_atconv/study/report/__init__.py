"""The report of a study: a page, Markdown, LaTeX and JSON, and a figure of its curves."""

from pathlib import Path

from sit_atconv.runtime.whole_files import write_json, write_text
from sit_atconv.study.report.contents import aggregates, contents
from sit_atconv.study.report.latex import latex
from sit_atconv.study.report.markdown import markdown
from sit_atconv.study.report.page import page
from sit_atconv.study.results import Study


def write_report(study: Study, folder: Path) -> None:
    """Write report.html, report.md, report.tex and report.json into the study's `folder`, each whole or not at all."""
    told = contents(study)
    write_text(folder / "report.html", page(told, folder))
    write_text(folder / "report.md", markdown(told))
    write_text(folder / "report.tex", latex(told))
    write_json(folder / "report.json", aggregates(told))
