"""The network as the solvers call it: what depends only on time and label is computed once per step and label."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sit_atconv.models import SiT


@dataclass(frozen=True)
class LabelTable:
    """A batch's distinct labels (U,) int64, the null class last, and each sample's row in this table, (B,) int64.

    U is smaller than B if samples share labels. The null half of a guided batch shares the row of the null class.
    """

    labels: Tensor
    rows: Tensor

    @classmethod
    def of(cls, labels: Tensor, null_label: int, device: torch.device) -> "LabelTable":
        """The table of labels (B,) on the CPU."""
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
        compile: compile the repeated blocks, one program for all batch sizes; the model stays compiled.
    """

    def __init__(self, model: SiT, precision: str = "no", compile: bool = False) -> None:
        self.model, self.precision = model, precision
        if compile:
            model.compile_repeated_blocks(dynamic=True)

    def bind(self, table: LabelTable | None, internal: bool = False) -> Callable[..., Any]:
        """The network as a callable of (x, t, rows), where `rows` index the table; of (x, t) without labels.

        With `internal` it returns a pair: the prediction, and that of the model's own head for Internal Guidance. Of a
        flow map it also takes `r`, the time to which the average velocity leads: a scalar, like t.
        """
        call = partial(self._call, internal)
        return call if table is None else lambda x, t, rows, **end: call(x, t, table.labels, rows, **end)

    def _call(
        self,
        internal: bool,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        rows: Tensor | None = None,
        **end: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        x = x.to(self.model.dtype)
        with torch.autocast(x.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext():
            if t.ndim == 0:
                return self.model(x, t, labels, rows, internal=internal, **end)
            # Samples with separate times (dopri5) do not share conditions.
            return self.model(x, t, None if labels is None else labels[rows], internal=internal)
