"""Sample grids of the rows side by side, in the page itself."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sit_atconv.study.report.tables import finished
from sit_atconv.study.results import Cell, Study

_LONGEST_SIDE = 1024  # pixels: larger grids are reduced, so that the page stays small


@dataclass(frozen=True)
class Picture:
    """A row's samples: the picture as a data URI, or why there is none."""

    row: str
    data: str | None
    missing: str


@dataclass(frozen=True)
class Samples:
    """All rows' samples of one budget and one training seed."""

    budget: str
    seed: int
    pictures: list[Picture]


def sample_grids(study: Study, folder: Path) -> list[Samples]:
    """For each budget the grids of the first seed for which most rows have one; none where no row has any."""
    found = []
    for budget in study.budgets:
        cells = {row: finished(study, row, budget) for row in study.rows}

        def grids(seed: int, cells: dict[str, dict[int, Cell]] = cells) -> int:
            return sum(seed in own and own[seed].grid is not None for own in cells.values())

        seed = max(study.seeds, key=grids)
        if grids(seed):
            pictures = [_picture(row, own.get(seed), folder) for row, own in cells.items()]
            found.append(Samples(budget, seed, pictures))
    return found


def _picture(row: str, cell: Cell | None, folder: Path) -> Picture:
    if cell is None:
        return Picture(row, None, "this run is not done")
    if cell.grid is None:
        return Picture(row, None, "no samples were drawn")
    try:
        with Image.open(folder / cell.grid) as image:
            image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
            file = io.BytesIO()
            image.save(file, "PNG", optimize=True)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow has these for bad files
        return Picture(row, None, f"{cell.grid} cannot be read: {error}")
    return Picture(row, f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}", "")
