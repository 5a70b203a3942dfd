"""The log of a run: averages over intervals and notes, in log.jsonl and the trackers."""

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from msgspec import Meta
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.runtime.reading import Count, parse_json, understand
from sit_atconv.runtime.whole_files import whole_file

log = logging.getLogger(__name__)

_DAMAGED = "log.damaged.jsonl"

Record = dict[str, Annotated[int, Meta(ge=-(2**53), le=2**53)] | float | str | None]


class Averages:
    """Means of scalars over the finite steps, kept on the device, which is not waited for until they are read."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = torch.zeros((), device=self._accelerator.device)

    @torch.no_grad()
    def add(self, values: dict[str, Tensor], finite: Tensor) -> None:
        """Add the values of one step, unless it was not `finite`, a bool scalar."""
        for name, value in values.items():
            term = torch.where(finite, value.float(), 0.0)
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._count = self._count + finite

    def read(self) -> dict[str, float | None]:
        """The means over steps and processes since the last call, None without a finite step. All processes call it."""
        totals = self._accelerator.reduce(self._totals(), "mean").tolist()
        names, count = list(self._sums), totals.pop()
        self._clear()
        return {name: value / count if count else None for name, value in zip(names, totals, strict=True)}

    def state(self) -> dict[str, Any]:
        """The state for `restore`, as plain numbers: one row of sums per process. All processes call it."""
        rows = self._accelerator.gather(self._totals().unsqueeze(0)).tolist()
        return {"names": list(self._sums), "rows": rows}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state. If the number of processes has changed, each takes the mean of the sums."""
        rows, accelerator = torch.tensor(state["rows"], device=self._accelerator.device), self._accelerator
        row = rows[accelerator.process_index] if len(rows) == accelerator.num_processes else rows.mean(0)
        *sums, self._count = row.unbind()
        self._sums = dict(zip(state["names"], sums, strict=True))

    def _totals(self) -> Tensor:
        return torch.stack([*self._sums.values(), self._count])


class RunLog:
    """log.jsonl and the trackers. Only the main process writes; the others may call it."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self._accelerator = path, accelerator

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run will write again.

        Lines that cannot be read are moved to log.damaged.jsonl, and a note says so.
        """
        if not self._accelerator.is_main_process or not self.path.exists():
            return
        lines, damaged = _split(self.path)
        if damaged:
            with self.path.with_name(_DAMAGED).open("ab") as file:
                file.writelines(line + b"\n" for line in damaged)
        with whole_file(self.path) as rewound:
            rewound.write(b"".join(line + b"\n" for line, record in lines if record["step"] <= step))
        if damaged:
            note = f"{len(damaged)} damaged lines of {self.path.name} were moved to {_DAMAGED}."
            log.warning(note)
            self.note(step, note)

    def lines(self) -> list[Record]:
        """What is in the log; nothing on processes other than the main one."""
        return read_log(self.path) if self._accelerator.is_main_process and self.path.exists() else []

    def write(self, record: dict[str, Any]) -> None:
        """Append one line of numbers, and send it to the trackers."""
        self._append(record)
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._accelerator.log(numbers, step=record["step"])

    def note(self, step: int, text: str) -> None:
        """Append a line with a text about what happened at `step`."""
        self._append({"step": step, "note": text})

    def _append(self, record: dict[str, Any]) -> None:
        if self._accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[Record]:
    """The lines of a log.jsonl, except those that cannot be read."""
    return [record for _, record in _split(path)[0]]


def _split(path: Path) -> tuple[list[tuple[bytes, Record]], list[bytes]]:
    """The valid lines with their records, and the lines that are not a record of a step.

    Text after the last line break is dropped unless it is a complete record: a kill cut it short.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    good, damaged = [], []
    for line in [*lines, rest]:
        try:
            record = parse_json(line, Record, "the line")
            understand(record.get("step"), Count, "step")
            good.append((line, record))
        except InputError:
            damaged += [line] if line and line is not rest else []
    return good, damaged
