"""A cell in work: its lock, and its programs one after the other, each in a process that ends with this one."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from sit_atconv.runtime.lock import lock_folder
from sit_atconv.runtime.processes import die_with_parent
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.whole_files import write_json, write_text
from sit_atconv.study.commands import ROOT, Command
from sit_atconv.study.plan import CellName

log = logging.getLogger(__name__)

# In a cell's folder: what its programs say, why it failed, and the machines that it ran on
LOG, ERROR, MACHINE = "log.txt", "error.txt", "machine.json"
_SHOWN, _LONGEST = 12, 65_536  # lines of a failed program's log, and bytes that they are looked for in


class Work:
    """Runs the commands of a cell that have no complete result yet. Call `advance` until it returns True, then `close`.

    The cell is locked meanwhile. Every program has a session of its own, so that Ctrl-C in a terminal reaches only the
    study, which asks the programs to stop as a scheduler would: training then writes a checkpoint. On Linux a program
    is killed when this process dies.

    Raises `InputError` when another process runs the cell.
    """

    def __init__(
        self, cell: CellName, commands: list[Command], folder: Path, machine: str, environment: Mapping[str, str]
    ) -> None:
        self.cell, self.error = cell, ""
        self._commands, self._folder, self._environment = commands, folder, environment
        self._command: Command | None = None
        self._program: subprocess.Popen | None = None
        self._sent: int | None = None  # the last signal to it
        self._begun, self.started = 0, False  # where the program's words begin in the log; whether any was started
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(lock_folder(folder, "run", "--out"))
        (folder / ERROR).unlink(missing_ok=True)
        if any(not command.complete for command in commands):
            write_json(folder / MACHINE, sorted({machine, *machines(folder)}))

    @property
    def doing(self) -> str:
        """What the cell is at."""
        return self._command.name if self._command else "beginning"

    @property
    def done(self) -> bool:
        """Whether all results are complete."""
        return all(command.complete for command in self._commands)

    def advance(self, stopping: int | None = None) -> bool:
        """Start the next program when one has ended; returns whether the cell has ended.

        Then it is done, or has failed, and `error` says how, or was stopped: `stopping` is the signal that a program
        which is running gets, and no other is started.
        """
        if self._program is not None:
            if stopping is not None:
                self._stop(stopping)
            code = self._program.poll()
            if code is None:
                return False
            self._program = None
            if stopping is None and (code != 0 or not self._command.complete):
                self.error = self._describe(code)
        self._command = next((command for command in self._commands if not command.complete), None)
        if stopping is not None or self.error or self._command is None:
            return True
        self._start()
        return False

    def close(self) -> None:
        """Keep an error for who collects the results, leave no program running, and release the cell."""
        if self._program is not None:
            self._stop(signal.SIGKILL)
        if self.error:
            write_text(self._folder / ERROR, f"{self.error}\n")
        self._lock.close()

    def _stop(self, number: int) -> None:
        """Send a signal to the program, once; SIGKILL goes to the processes that it has started as well."""
        if number != self._sent:
            self._sent = number
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(self._program.pid, number)
                else:
                    self._program.send_signal(number)

    def _start(self) -> None:
        with (self._folder / LOG).open("ab") as file:
            file.write(f"\n$ {self._command.line}\n".encode())
            file.flush()
            self._begun, self.started = file.tell(), True
            self._program = subprocess.Popen(
                self._command.words,
                cwd=ROOT if self._command.module else None,
                env={**self._environment, **dict(self._command.variables)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )

    def _describe(self, code: int) -> str:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == 0:
            how = "ended without its result"
        said = "\n".join(f"    {line}" for line in last_lines(self._folder / LOG, self._begun))
        return (
            f"{self.cell}: {self.doing} {how}. The end of what it said, which is all in {self._folder / LOG}:\n{said}"
        )


def machines(folder: Path) -> list[str]:
    """The machines that a cell has run on."""
    return read_json(folder / MACHINE, list[str]) if (folder / MACHINE).exists() else []


def last_lines(path: Path, begun: int) -> list[str]:
    """The last lines of a program's log, which begins at byte `begun`; of a progress bar only its last state."""
    with path.open("rb") as file:
        file.seek(max(begun, path.stat().st_size - _LONGEST))
        text = file.read().decode(errors="replace")
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-_SHOWN:]
