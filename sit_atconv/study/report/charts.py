"""Drawings of the curves: SVG that takes the page's colours, and one figure for README and docs."""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sit_atconv.errors import InputError
from sit_atconv.figures import pyplot_without_screen
from sit_atconv.runtime.whole_files import whole_file
from sit_atconv.study.report.curves import Curve, Panel, panels
from sit_atconv.study.report.tables import EQUAL, HELDOUT, UNITS
from sit_atconv.study.report.texts import shortened
from sit_atconv.study.results import Study

# Colours that colour-blind people tell apart (Okabe and Ito). The first row has the ink of the text; yellow comes last.
_INK = "#101418"
_COLOURS = (_INK, "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
_DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))  # further rows have the colours again, but other lines
_SIZE = (5.2, 3.5)  # inches of a panel, so that its text is legible on a telephone and not huge on a desk
_SETTINGS = {
    "text.parse_math": False,  # a row may be called "$\frac"
    "svg.fonttype": "none",
    "svg.hashsalt": "sit-atconv",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "figure.titlesize": 13,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_NAME_LENGTH = 36  # characters of a row in the figure's legend
_LINE_LENGTH = 45  # characters that the width of a panel holds


@dataclass(frozen=True)
class Style:
    """How a row is drawn everywhere: a CSS colour, and lengths of dashes and gaps (none for a solid line)."""

    colour: str
    dashes: tuple[float, ...]


def styles(rows: list[str]) -> dict[str, Style]:
    """A style for every row; "currentColor" is that of the text."""
    found = {}
    for number, row in enumerate(rows):
        colour = _COLOURS[number % len(_COLOURS)]
        dashes = _DASHES[number // len(_COLOURS) % len(_DASHES)]
        found[row] = Style("currentColor" if colour == _INK else colour, dashes)
    return found


def svg_charts(study: Study) -> list[tuple[str, str]]:
    """What each chart shows, and the chart as SVG for a page: no size of its own, text as text, ids that are unique.

    Raises `InputError` when matplotlib is not installed.
    """
    pyplot = pyplot_without_screen()
    found = []
    for number, panel in enumerate(panels(study)):
        with pyplot.rc_context(_SETTINGS):
            figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
            _draw(axes, panel, styles(study.rows))
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
        found.append((caption(panel), _for_a_page(file.getvalue(), f"chart{number}-")))
    return found


def draw_figure(study: Study, out: Path) -> None:
    """Write the charts side by side as one figure with a legend: PNG, or SVG where the name of `out` ends so.

    Raises `InputError` when matplotlib is not installed, and when there are no curves yet.
    """
    pyplot = pyplot_without_screen()
    drawn, styled = panels(study), styles(study.rows)
    if not drawn:
        raise InputError(f"{study.title}: no run is done that has a curve of its loss: there is nothing to draw yet.")
    with pyplot.rc_context(_SETTINGS):
        width = _SIZE[0] * len(drawn)
        figure, axes = pyplot.subplots(1, len(drawn), figsize=(width, 4.2), squeeze=False, layout="constrained")
        for axis, panel in zip(axes[0], drawn, strict=True):
            _draw(axis, panel, styled)
            axis.set_title(_runs(panel))
        lines = [pyplot.Line2D([], [], **_line(style), linewidth=2) for style in styled.values()]
        # matplotlib leaves out of a legend what begins with "_".
        names = [" " + shortened(row, _NAME_LENGTH) for row in study.rows]
        columns = len(drawn) * _LINE_LENGTH // (max(map(len, names)) + 5)
        figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), columns))
        figure.suptitle(shortened(study.title, len(drawn) * _LINE_LENGTH))
        with whole_file(out) as file:
            figure.savefig(file, dpi=130, format="svg" if out.suffix.lower() == ".svg" else "png", facecolor="white")
        pyplot.close(figure)


def caption(panel: Panel) -> str:
    """What a panel shows, in a sentence."""
    what = "Held-out loss" if panel.quantity == HELDOUT else "Training loss (no held-out loss was measured)"
    over = "steps" if panel.axis == "step" else "seconds of training"
    return f"{what} over {over}: {_runs(panel)}."


def _runs(panel: Panel) -> str:
    return f"runs with {EQUAL[panel.budget]}"


def _draw(axes: Any, panel: Panel, styled: dict[str, Style]) -> None:
    for row, curve in panel.curves.items():
        line = _line(styled[row])
        axes.fill_between(curve.x, curve.low, curve.high, color=line["color"], alpha=0.15, linewidth=0)
        alone = {"marker": "o"} if len(curve.x) == 1 else {}
        axes.plot(curve.x, curve.mean, **line, **alone, linewidth=1.8)
    axes.set_xlim(left=0)
    axes.set_ylim(*_limits(list(panel.curves.values())))
    axes.set(
        xlabel="steps" if panel.axis == "step" else UNITS["seconds"],
        ylabel="held-out loss" if panel.quantity == HELDOUT else "training loss",
    )
    axes.grid(color=_INK, alpha=0.12, linewidth=0.8)
    axes.locator_params(nbins=6)


def _limits(curves: list[Curve]) -> tuple[float, float]:
    """Bounds of the loss from a quarter of each curve on: the fall before it would flatten all differences."""
    late = [curve.x >= curve.x[-1] / 4 for curve in curves]
    low = min(curve.low[part].min() for curve, part in zip(curves, late, strict=True))
    high = max(curve.high[part].max() for curve, part in zip(curves, late, strict=True))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
    return low - margin, high + margin


def _line(style: Style) -> dict[str, Any]:
    colour = _INK if style.colour == "currentColor" else style.colour
    return {"color": colour, "linestyle": (0, style.dashes) if style.dashes else "-"}


def _for_a_page(svg: str, prefix: str) -> str:
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'((?: id|xlink:href)="#?|url\(#)', rf"\g<1>{prefix}", svg)
