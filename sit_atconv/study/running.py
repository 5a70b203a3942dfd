"""Runs the cells of a study, one or several at once, in a single thread that looks after their programs."""

import contextlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sit_atconv.errors import InputError
from sit_atconv.runtime.cpu import cores, processor
from sit_atconv.study.commands import cell_commands, cell_folder
from sit_atconv.study.plan import CellName, Plan
from sit_atconv.study.progress import Progress
from sit_atconv.study.work import Work

log = logging.getLogger(__name__)

_PAUSE = 0.2  # seconds between two looks at the programs


@dataclass
class Outcome:
    """What has become of the cells. `elsewhere`: other processes run them. `stopped`: the signal that ended it."""

    done: list[CellName] = field(default_factory=list)
    failed: list[CellName] = field(default_factory=list)
    elsewhere: list[CellName] = field(default_factory=list)
    stopped: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a cell runs: variables of its programs' environment, and words for the report."""

    variables: dict[str, str]
    machine: str


def places(parallel: int) -> list[Place]:
    """A place for each of the cells that run at once: its threads of the CPU, and a GPU of its own if there are GPUs.

    Raises `InputError` when there are fewer GPUs than cells at once.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // parallel))
    variables = {"OMP_NUM_THREADS": threads, "TQDM_MININTERVAL": "10"}  # bars go to a file
    at_once = f"{parallel} cell{'s' if parallel > 1 else ''} at once"
    count = torch.cuda.device_count()
    if not count:
        machine = f"{processor()}, {threads} thread{'' if threads == '1' else 's'} a cell, {at_once}"
        return [Place(variables, machine)] * parallel
    if parallel > count:
        raise InputError(f"--parallel {parallel}: each cell needs a GPU of its own, and there are {count}.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:count]
    numbers = visible if len(visible) == count else [str(number) for number in range(count)]
    return [
        Place({**variables, "CUDA_VISIBLE_DEVICES": number}, f"{torch.cuda.get_device_name(i)}, {at_once}")
        for i, number in enumerate(numbers[:parallel])
    ]


class Runner:
    """Runs cells; `finished` is called after each that is done or has failed."""

    def __init__(self, plan: Plan, folder: Path, parallel: int, finished: Callable[[], None]) -> None:
        self._plan, self._folder, self._finished = plan, folder, finished
        self._free, self._working, self._outcome = deque(places(parallel)), {}, Outcome()
        self._stopping: int | None = None  # the signal for programs that are running

    def run(self, cells: Iterable[CellName]) -> Outcome:
        """Run the cells until each is done, has failed or is left to another process, or until a signal.

        The first Ctrl-C or SIGTERM asks the programs to end, training with a checkpoint, and waits for them; the next
        one kills them.
        """
        waiting = deque(cells)
        log.info("%s. Compare times only within one number of cells at once.", self._free[0].machine)
        bar = tqdm(total=len(waiting), bar_format="{desc}", disable=None)
        with self._stoppable(), bar, logging_redirect_tqdm():
            progress = Progress(self._plan, self._folder, len(waiting), bar)
            while self._working or (waiting and self._outcome.stopped is None):
                while waiting and self._free and self._outcome.stopped is None:
                    self._begin(waiting.popleft(), progress)
                for work in [work for work in self._working if work.advance(self._stopping)]:
                    self._end(work, progress)
                progress.show((work.cell, work.doing) for work in self._working)
                if self._working:
                    time.sleep(_PAUSE)
        return self._outcome

    def _begin(self, cell: CellName, progress: Progress) -> None:
        progress.begin(cell)
        place, folder = self._free[0], cell_folder(self._folder, cell)
        commands = cell_commands(self._plan, self._folder, cell)
        try:
            work = Work(cell, commands, folder, place.machine, {**os.environ, **place.variables})
        except InputError as error:  # of the lock
            log.info("%s", error)
            self._outcome.elsewhere.append(cell)
            progress.end(cell, worked=False)
            return
        self._working[work] = self._free.popleft()

    def _end(self, work: Work, progress: Progress) -> None:
        self._free.append(self._working.pop(work))
        progress.end(work.cell, worked=work.started)
        if work.error:
            log.error("%s", work.error)
            self._outcome.failed.append(work.cell)
        elif work.done:
            log.info("%s is done%s.", work.cell, "" if work.started else " already")
            self._outcome.done.append(work.cell)
        work.close()
        if self._outcome.stopped is None:
            with contextlib.suppress(InputError):  # a result that cannot be read, which the end of the study reports
                self._finished()

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Notice Ctrl-C and SIGTERM within the context; leave no program running after an error."""

        def notice(number: int, frame: FrameType | None) -> None:
            self._stopping = signal.SIGTERM if self._stopping is None else signal.SIGKILL
            self._outcome.stopped = number

        before = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for work in self._working:
                work.close()
