"""The progress of a study, for the person who waits for it."""

import contextlib
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from sit_atconv.errors import InputError
from sit_atconv.runtime.reading import parse_json
from sit_atconv.study.commands import cell_folder
from sit_atconv.study.plan import CellName, Plan

log = logging.getLogger(__name__)

_EVERY, _EVERY_IN_A_FILE = 1, 60  # seconds between lines on a terminal, and elsewhere
_TAIL = 8_192  # bytes at the end of a log that hold its last lines


@dataclass(frozen=True)
class _Step:
    """The part of a run's log line that says how far it is."""

    step: int
    seconds: float


class Progress:
    """Shows lines such as "cell 3 of 20: atconv/steps-0, training, step 1200; 1:20:10 left".

    The time left assumes that what is left of the cells takes as long as what this start has done of them. `bar` shows
    its description only; it is disabled where there is no terminal, and the lines then go to the log.
    """

    def __init__(self, plan: Plan, folder: Path, cells: int, bar: tqdm) -> None:
        self._plan, self._folder, self._cells, self._bar = plan, folder, cells, bar
        self._numbers: dict[CellName, int] = {}
        self._there: dict[CellName, float] = {}  # shares of cells that were there at the beginning
        self._ended, self._left = 0.0, float(cells)  # in cells: done by this start, and to be done by it
        self._started = self._shown = time.monotonic()

    def begin(self, cell: CellName) -> None:
        """A cell is looked at."""
        self._numbers[cell] = len(self._numbers) + 1
        self._there[cell] = self._share(cell)[1]
        self._left -= self._there[cell]

    def end(self, cell: CellName, worked: bool) -> None:
        """A cell has ended; `worked` is whether this start did anything for it."""
        rest = 1 - self._there.pop(cell)
        self._left -= rest
        self._ended += rest if worked else 0

    def show(self, working: Iterable[tuple[CellName, str]]) -> None:
        """Say where each of the cells in work is, if it is time for it."""
        silent = self._bar.disable
        if (now := time.monotonic()) - self._shown < (_EVERY_IN_A_FILE if silent else _EVERY):
            return
        self._shown = now
        texts, done = [], self._ended
        for cell, doing in working:
            step, share = self._share(cell)
            at = f", step {step}" if doing == "training" and step else ""
            texts.append(f"{self._numbers[cell]} of {self._cells}: {cell}, {doing}{at}")
            done += share - self._there[cell]
        left = self._left + self._ended - done
        remaining = tqdm.format_interval((now - self._started) * left / done) if done > 0 else "?"
        line = f"cell {'; '.join(texts)}; {remaining} left"
        if silent:
            log.info("%s", line)
        else:
            self._bar.set_description_str(line)

    def _share(self, cell: CellName) -> tuple[int, float]:
        """The last logged step of a cell, and the share of its training that is done."""
        for line in _last_lines(cell_folder(self._folder, cell) / "run" / "log.jsonl"):
            with contextlib.suppress(InputError):  # a note, scores, or a line that is cut off
                step = parse_json(line, _Step, "the line")
                done = step.step if cell.budget == "steps" else step.seconds
                return step.step, min(1.0, done / self._plan.budgets.given()[cell.budget])
        return 0, 0.0


def _last_lines(path: Path) -> list[bytes]:
    """Some of the last lines of a file, the last one first; none if it is not there."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        return file.read().splitlines()[::-1]
    return []
