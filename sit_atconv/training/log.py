"""What a run says: averages over an interval, one line each in log.jsonl, on the progress bar and to the trackers."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Averages:
    """Running means of scalars, kept on the device: nothing waits for it until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: dict[str, Tensor], weight: float = 1.0) -> None:
        """Add `weight` times each scalar; the weights of one step sum to 1."""
        for name, value in values.items():
            term = value.detach().float() * weight
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def step(self) -> None:
        """Count one step."""
        self._count += 1

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call; `reduce` averages over processes."""
        names = list(self._sums)
        values = (reduce(torch.stack([self._sums[n] for n in names])) / self._count).tolist() if names else []
        self._sums, self._count = {}, 0
        return dict(zip(names, values, strict=True))

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain numbers."""
        return {"count": self._count, "sums": {name: value.item() for name, value in self._sums.items()}}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        self._count = state["count"]
        self._sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}


class RunLog:
    """log.jsonl and the trackers. Only the main process writes."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator
        self._since = time.perf_counter()

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run will write again."""
        if not self.accelerator.is_main_process or not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        rewound = self.path.with_suffix(".rewound")
        rewound.write_text("".join(line + "\n" for line in kept))
        rewound.replace(self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=record["step"])

    def seconds(self) -> float:
        """Wall-clock seconds since the last call, or since the start."""
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        return elapsed


def _step_of(line: str) -> float:
    """The step of a log line; a line that a kill cut short counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
