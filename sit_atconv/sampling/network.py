"""The network as the solvers call it: what depends on time and label alone is computed once a step and label."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sit_atconv.models import SiT


@dataclass(frozen=True)
class LabelTable:
    """A batch's distinct labels (U,) int64, the null class last, and the row of each sample, (B,) int64.

    Where samples share labels U is smaller than B, and both halves of a guided batch share the null class's one row.
    """

    labels: Tensor
    rows: Tensor

    @classmethod
    def of(cls, labels: Tensor, null_label: int, device: torch.device) -> "LabelTable":
        """The table of labels (B,) that are on the CPU."""
        distinct, rows = labels.unique(return_inverse=True)
        table = torch.cat([distinct, torch.tensor([null_label])])
        return cls(table.to(device, non_blocking=True), rows.to(device, non_blocking=True))

    @property
    def null_row(self) -> int:
        """The row of the null class."""
        return len(self.labels) - 1


class StepNetwork:
    """A SiT in its precision.

    Args:
        model: on its device, in eval mode.
        precision: "no", or "bf16" for autocast.
        compile: let torch.compile make one program of the blocks of a kind, for all batch sizes; the model stays so.
    """

    def __init__(self, model: SiT, precision: str = "no", compile: bool = False) -> None:
        self.model, self.precision = model, precision
        if compile:
            model.compile_repeated_blocks(dynamic=True)

    def bind(self, table: LabelTable | None) -> Callable[..., Tensor]:
        """The network as a callable of (x, t, rows), rows of this table; of (x, t) without labels."""
        if table is None:
            return self._call
        return lambda x, t, rows: self._call(x, t, table.labels, rows)

    def _call(self, x: Tensor, t: Tensor, labels: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        x = x.to(self.model.dtype)
        with torch.autocast(x.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext():
            if t.ndim == 0:
                return self.model(x, t, labels, rows)
            # Samples at times of their own (dopri5) share no condition.
            return self.model(x, t, None if labels is None else labels[rows])
