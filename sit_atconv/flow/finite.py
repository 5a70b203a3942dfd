"""A check for NaN and infinity that does not make the host wait for the device at every step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.flow.field import per_sample


class NonFiniteError(InputError):
    """States became NaN or infinite.

    Attributes:
        step: the first step after which a state was not finite, counted from 1.
        time: the time at the start of that step.
        rows: batch indices of all samples that became non-finite.
    """

    def __init__(self, step: int, time: float, rows: Sequence[int], samples: Sequence[int] | None = None) -> None:
        self.step, self.time, self.rows = step, time, list(rows)
        names = self.rows if samples is None else [samples[row] for row in self.rows]
        super().__init__(
            f"The model gave NaN or infinity in step {step}, from t = {time:.4g}, for {_listed(names)}"
            f"{' of the batch' if samples is None else ''}: check its weights, try a wider precision than 16 bits or "
            "smaller steps."
        )


class FiniteGuard:
    """Records on the device the step after which each sample was first not finite, and reads it once, at the end.

    Args:
        x: the starting state, (B, ...).
        samples: numbers of the samples for the error message; their batch indices when not given.
    """

    def __init__(self, x: Tensor, samples: Sequence[int] | None = None) -> None:
        self.samples = samples
        self.never = torch.iinfo(torch.int64).max
        self.first_bad = torch.full((len(x),), self.never, device=x.device)

    def watch(self, step: int, state: Tensor) -> None:
        """Record which samples of the state (B, ...) after step `step`, counted from 0, are not finite."""
        finite = per_sample(state).isfinite().all(1)
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=step))

    def check(self, times: Sequence[float]) -> None:
        """Raise `NonFiniteError` if a sample was not finite after any step; `times` are the steps' start times."""
        first_bad = self.first_bad.tolist()
        rows = [row for row, step in enumerate(first_bad) if step != self.never]
        if rows:
            step = min(first_bad)
            raise NonFiniteError(step + 1, times[step], rows, self.samples)


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    """ "sample 4", "samples 4 to 9" or "samples 4, 7, 9"; a long list is cut, with the number of the rest."""
    if len(numbers) == 1:
        return f"sample {numbers[0]}"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"samples {numbers[0]} to {numbers[-1]}"
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"samples {', '.join(map(str, numbers[:most]))}{more}"
