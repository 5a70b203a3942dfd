"""Averages of the weights over training, which are saved in checkpoints and used for sampling."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sit_atconv.config import TrainingConfig
from sit_atconv.errors import InputError
from sit_atconv.training.averages.sharding import copy_whole, local, whole
from sit_atconv.training.averages.statistics import statistics_of


class Profile(Protocol):
    """How much the weights of each step count. `name` distinguishes the averages of a run."""

    name: str

    def weight(self, step: int) -> float:
        """w of `average ← (1 − w)·average + w·weights` after step 1, 2, …"""

    def first_share(self, step: int, skipped: int) -> float:
        """The share in the average of the weights before step 1, ∏ (1 − w) over the steps so far but the skipped ones.

        Only the number of skipped steps is known: where it matters which they were, they are taken for the first ones.
        """


@dataclass(frozen=True)
class ConstantDecay:
    """The usual exponential average: w = 1 − decay."""

    decay: float

    @property
    def name(self) -> str:
        return f"{self.decay:g}"

    def weight(self, step: int) -> float:
        return 1 - self.decay

    def first_share(self, step: int, skipped: int) -> float:
        return self.decay ** (step - skipped)


@dataclass(frozen=True)
class PowerFunction:
    """EDM2's average (arXiv 2312.02696, Eq. 2 and 127): step τ of t counts in proportion to τ^γ.

    Its width grows with the run; `width` is its standard deviation over the length of the run, σ_rel in (0, 12^-½).
    """

    width: float

    def __post_init__(self) -> None:
        if not 0 < self.width < 12**-0.5:
            raise InputError(f"No power function has a relative width of {self.width}: choose one in (0, 0.288].")

    @property
    def name(self) -> str:
        return f"power-{self.width:g}"

    @property
    def exponent(self) -> float:
        """γ of `width`."""
        return exponent_of_width(self.width)

    def weight(self, step: int) -> float:
        # 1 − (1 − 1/t)^(γ+1) without cancellation; 1 at the first step, so the initial weights do not count.
        return -math.expm1((self.exponent + 1) * math.log1p(-1 / step)) if step > 1 else 1.0

    def first_share(self, step: int, skipped: int) -> float:
        return (skipped / step) ** (self.exponent + 1) if step else 1.0


def exponent_of_width(width: float) -> float:
    """γ > 0 whose profile τ^γ on [0, 1] has this standard deviation: σ² = (γ + 1) / ((γ + 2)²(γ + 3))."""
    inverse = width**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real[np.abs(roots.imag) < 1e-9].max())


def profiles(config: TrainingConfig) -> list[Profile]:
    """The averages that a run keeps; the first is used for sampling.

    Raises `InputError` when one is listed twice, or has an impossible width.
    """
    found = [ConstantDecay(d) for d in (config.ema_decay, *config.more_ema_decays)]
    found += [PowerFunction(w) for w in config.power_ema]
    names = [profile.name for profile in found]
    if len(set(names)) < len(names):
        raise InputError(f"The averages {', '.join(names)} name one twice: give each decay and width only once.")
    return found


class WeightAverages:
    """fp32 averages of a model's weights, each sharded as the weights are, and of its statistics.

    Statistics are the buffers of its state dict, as BatchNorm has; whole numbers among them are copied. They begin as 0
    and 1, whatever the data, and 0.5 % of that 1 would make a variance of 0.01 half too large. So the average forgets
    them sooner than the first weights, by at least 9 / (10 + step) a step (the warm-up of TensorFlow's averages).

    Args:
        model: the model whose weights are averaged, on its device, wrapped for many processes or not.
        twin: a copy of the model for sampling, which will hold an average.
    """

    def __init__(self, model: nn.Module, twin: nn.Module, profiles: list[Profile]) -> None:
        self.profiles, self._model = {profile.name: profile for profile in profiles}, model
        self.main = profiles[0].name
        self._statistics = dict(statistics_of(model))
        self._averages = {
            name: {key: tensor.clone() for key, tensor in self._tensors() if tensor.is_floating_point()}
            for name in self.profiles
        }
        self._counts = {key: tensor.clone() for key, tensor in self._tensors() if not tensor.is_floating_point()}
        self.twin = twin.eval().requires_grad_(False)
        nothing = {key: tensor.to("meta") for key, tensor in twin.state_dict().items()}
        self.twin.load_state_dict(nothing, assign=True)  # its own weights are not needed: free their memory

    @torch.no_grad()
    def update(self, step: int, taken: Tensor) -> None:
        """Move every average towards the weights after `step`; leave them alone if `taken`, a bool scalar, is false."""
        now = dict(self._tensors())
        weights = [local(now[key]) for key in self._averages[self.main]]
        for name, profile in self.profiles.items():
            averages = [local(average) for average in self._averages[name].values()]
            share = profile.weight(step)
            usual, sooner = taken * share, taken * max(share, 9 / (10 + step))  # both stay on the device
            shares = [sooner if key in self._statistics else usual for key in self._averages[name]]
            torch._foreach_lerp_(averages, weights, shares)
        for key, count in self._counts.items():
            count.copy_(torch.where(taken, now[key], count))

    def model(self, name: str | None = None) -> nn.Module:
        """The averaged model in eval mode, by default of the first average: always the same object, with new weights.

        All processes call it when weights are sharded. If they are not, the model shares the average's memory.
        """
        tensors = {key: whole(tensor) for key, tensor in self.tensors(name or self.main)}
        self.twin.load_state_dict(tensors, assign=True)
        return self.twin

    def first_shares(self, step: int, skipped: int) -> dict[str, float]:
        """The share of the weights before step 1 in each average, see `Profile.first_share`."""
        return {name: profile.first_share(step, skipped) for name, profile in self.profiles.items()}

    def tensors(self, name: str) -> Iterable[tuple[str, Tensor]]:
        """An average's tensors by the model's names, sharded if the weights are."""
        return (self._averages[name] | self._counts).items()

    def restore(self, name: str, state: dict[str, Tensor]) -> None:
        """Set an average from complete tensors by the model's names."""
        for key, tensor in self.tensors(name):
            copy_whole(tensor, state[key])

    def _tensors(self) -> Iterable[tuple[str, Tensor]]:
        """What is averaged of the model now: parameters as fp32, and statistics."""
        for key, parameter in self._model.named_parameters():
            yield key, parameter.detach().float()
        yield from self._statistics.items()
