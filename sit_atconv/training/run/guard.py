"""Steps whose loss or gradient is not finite are skipped and counted; too many in a row end the run.

Only `check` waits for the device. It is called when the log is written, which waits anyway.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim import Optimizer

from sit_atconv.runtime.whole_files import write_json
from sit_atconv.training.run.stop import TrainingStopped


def poisoned(loss: Tensor) -> Tensor:
    """The loss, with a NaN gradient if the loss is not finite.

    Gradients are averaged over processes, so all processes learn of a bad loss on one of them from the gradient norm.
    A finite loss and its gradient are multiplied by 1.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def step_unless_bad(optimizer: Optimizer, finite: Tensor) -> None:
    """Make a fused optimizer skip its next step, on the device, unless `finite`: weights and state stay unchanged."""
    optimizer.found_inf = (~finite).float()


class Guard:
    """Counts skipped steps on the device; `check` reads the counts.

    Args:
        limit: number of bad steps in a row that stops the run.
        indices: step -> indices of the samples in its global batch.
        folder: where the file about bad steps is written.
    """

    def __init__(self, limit: int, indices: Callable[[int], list[int]], folder: Path, accelerator: Accelerator) -> None:
        self._limit, self._indices, self._folder, self._accelerator = limit, indices, folder, accelerator
        self._row, self._longest, self._skipped = torch.zeros(3, dtype=torch.int64, device=accelerator.device).unbind()
        self._steps: list[tuple[int, Tensor, dict[str, Tensor]]] = []  # since the last check, and bad steps just before

    @torch.no_grad()
    def note(self, step: int, finite: Tensor, terms: dict[str, Tensor]) -> None:
        """Record `finite` of `step`, a bool scalar on the device, and its loss terms."""
        self._skipped = self._skipped + ~finite
        self._row = (self._row + 1) * ~finite
        self._longest = torch.maximum(self._longest, self._row)
        self._steps.append((step, finite, terms))

    def check(self) -> int:
        """The number of steps skipped so far; waits for the device. All processes call it.

        Raises `TrainingStopped` when too many in a row were skipped, after writing a file that lists them.
        """
        skipped, longest, row = torch.stack([self._skipped, self._longest, self._row]).tolist()
        if longest >= self._limit:
            path = self._write()
            message = (
                f"{longest} steps in a row had a loss or gradient that is not finite, and were skipped. {path} names "
                "them, their losses and their samples. Training stopped; its checkpoints are from before them."
            )
            raise TrainingStopped(message if self._accelerator.is_main_process else 1)
        self._longest, self._steps = self._row, self._steps[-row:] if row else []
        return skipped

    def state(self) -> dict[str, int]:
        """The state for `restore`."""
        return {"skipped": int(self._skipped), "row": int(self._row)}

    def restore(self, state: dict[str, int]) -> None:
        """Continue counting from what `state` returned."""
        self._skipped = torch.full_like(self._skipped, state["skipped"])
        self._row = self._longest = torch.full_like(self._row, state["row"])

    def _write(self) -> Path:
        bad = [(step, terms) for step, finite, terms in self._steps if not finite]
        mine = [{name: _plain(value) for name, value in terms.items()} for _, terms in bad]
        by_process = gather_object([mine])
        path = self._folder / f"not-finite-step-{bad[-1][0]:07d}.json"
        if self._accelerator.is_main_process:
            report = [
                {"step": step, "terms": [terms[i] for terms in by_process], "samples": self._indices(step)}
                for i, (step, _) in enumerate(bad)
            ]
            write_json(path, report)
        return path


def _plain(value: Tensor) -> Any:
    """A number, or its name where JSON has none."""
    number = value.item()
    return number if math.isfinite(number) else str(number)
