"""The report as one HTML page, which needs no network and runs no script."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sit_atconv.errors import InputError
from sit_atconv.study.report.charts import styles, svg_charts
from sit_atconv.study.report.contents import Contents
from sit_atconv.study.report.pictures import sample_grids
from sit_atconv.study.report.tables import EQUAL
from sit_atconv.study.report.texts import entry_text, row_text

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(told: Contents, folder: Path) -> str:
    """The page; pictures are read from the study's `folder`. Without matplotlib it says so in place of the curves."""
    try:
        charts, without_charts = svg_charts(told.study), ""
    except InputError as error:  # a study of days is not to lose its report
        charts, without_charts = [], str(error)
    return _ENVIRONMENT.get_template("page.html.jinja").render(
        told=told,
        equal=EQUAL,
        styles=styles(told.study.rows),
        entry_text=entry_text,
        row_text=row_text,
        charts=[(caption, Markup(svg)) for caption, svg in charts],  # matplotlib has escaped its texts
        without_charts=without_charts,
        samples=sample_grids(told.study, folder),
    )
