"""How often drawing a sample calls the network: counted while the solver runs, with a stand-in for the network."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sit_atconv.models import SiT
from sit_atconv.sampling.draw import Drawing
from sit_atconv.sampling.settings import SamplerSettings


@dataclass(frozen=True)
class Calls:
    """Calls of networks for one sample.

    evaluations: of the velocity by the solver, each of which calls the model once. guided: how many of them also call
    the null class or the weak model.
    """

    evaluations: int
    guided: int

    @property
    def total(self) -> int:
        """Calls of the model, for a class or the null class, and of the weak model."""
        return self.evaluations + self.guided

    def __str__(self) -> str:
        extra = f" ({self.evaluations} evaluations, {self.guided} of them guided)" if self.guided else ""
        return f"{self.total}{extra}"


def count_calls(model: SiT, settings: SamplerSettings, weak: SiT | None = None) -> Calls | None:
    """The calls for a sample of `model`; None for dopri5, whose steps differ from sample to sample.

    Raises `InputError` when the settings ask for guidance that the models do not allow, as drawing would.
    """
    counted, other = _Counter(model), None if weak is None else _Counter(weak)
    drawing = Drawing(counted, replace(settings, precision="no", compile=False), other)
    if settings.solver == "dopri5":
        return None
    point = torch.zeros(1, model.config.in_channels, 1, 1)
    labels = torch.zeros(1, dtype=torch.int64) if model.config.num_classes else None
    drawing.integrate(point, labels, increment=lambda step: torch.zeros_like(point))
    guided = counted.samples - counted.calls + (0 if other is None else other.calls)
    return Calls(counted.calls, guided)


class _Counter:
    """Has a model's configuration, predicts zeros, and counts its calls and the samples in them."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, model: SiT) -> None:
        self.config, self.classes = model.config, model.classes
        self.calls = self.samples = 0

    def __call__(
        self, x: Tensor, *conditions: Tensor | None, internal: bool = False, **end: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        self.calls += 1
        self.samples += len(x)
        zeros = torch.zeros_like(x)
        return (zeros, zeros) if internal else zeros
