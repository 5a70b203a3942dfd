"""matplotlib without a screen, and figures as files that are whole or not there."""

from pathlib import Path
from typing import Any

from sit_atconv.errors import InputError
from sit_atconv.runtime.whole_files import make_folder_of, whole_file


def pyplot_without_screen() -> Any:
    """matplotlib.pyplot, drawing without a screen. Raises `InputError` when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("Curves need matplotlib: pip install 'sit-atconv[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, out: Path, dpi: int) -> None:
    """Write a figure as a PNG, whole or not at all, and close it."""
    make_folder_of(out)
    with whole_file(out) as file:
        figure.savefig(file, dpi=dpi, format="png")
    pyplot_without_screen().close(figure)
