"""What the loop and its checkpoints need to know of a run, whatever it trains."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from sit_atconv.config import Settings
from sit_atconv.training.averages.ema import WeightAverages
from sit_atconv.training.averages.statistics import statistics_of


@dataclass
class Trained(ABC):
    """`objective` and `optimizer` are `bare` and `adam` as wrapped by Accelerate; `model` is the network in `bare`."""

    weights_name: ClassVar[str]  # of the file of an average in its folder
    config: Settings
    accelerator: Accelerator
    model: nn.Module
    bare: nn.Module
    objective: nn.Module
    adam: Optimizer
    optimizer: Optimizer
    averages: WeightAverages

    @cached_property
    def statistics(self) -> list[Tensor]:
        """See `statistics_of`."""
        return [tensor for _, tensor in statistics_of(self.bare)]

    @abstractmethod
    def loader(self, start_step: int) -> DataLoader:
        """Micro-batches of this process from `start_step` on. Raises `InputError` when the batch cannot be divided."""

    @property
    @abstractmethod
    def data(self) -> str:
        """The fingerprint of the run's data."""

    @abstractmethod
    def epochs(self, step: int) -> float:
        """Images seen in so many steps over images to train on."""

    @abstractmethod
    def batch_indices(self, step: int) -> list[int]:
        """The rows of the data in the global batch of step 1, 2, …, over all processes and micro-batches."""

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Write into the folder of an average what is needed to build the network again."""

    def restore_config(self, folder: Path) -> None:  # noqa: B027, most networks have nothing to take over
        """Take over what such a folder knows of the network beyond the configuration."""
