"""How new mixers are fitted. With the network, the new pattern and the data, the settings determine the result."""

import math
from dataclasses import dataclass

import torch.nn.functional as F

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.sampling.settings import PRECISIONS

LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss, "huber": F.smooth_l1_loss}
_HALVINGS = 3


@dataclass(frozen=True)
class GraftSettings:
    """The defaults are those of the paper for attention (2506.05340): 200 epochs of 8,000 latents, at most.

    Args:
        steps: optimizer steps.
        batch_size: noised latents per step, over all processes.
        lr: AdamW's learning rate in the first quarter of the steps; it halves at the end of each quarter.
        loss: between outputs of the new and the old mixer, a mean over all numbers: "l1", "mse" or "huber".
        seed: of the new weights, the order of the data and all noise.
        precision: "no", or "bf16" to run both networks in autocast; weights and losses stay in fp32.

    Raises:
        InputError: for an unknown loss or precision, and a learning rate that is not positive.
    """

    steps: int = 25_000
    batch_size: int = 64
    lr: float = 5e-4
    loss: str = "l1"
    seed: int = 0
    precision: str = "no"

    def __post_init__(self) -> None:
        require_one_of(self.loss, LOSSES, "loss")
        require_one_of(self.precision, PRECISIONS, "precision")
        if not 0 < self.lr < math.inf:
            raise InputError(f"The learning rate must be positive and finite, not {self.lr}.")

    def learning_rate(self, step: int) -> float:
        """The learning rate of step 1, 2, …: halved after a quarter, a half and three quarters of the steps."""
        return self.lr * 0.5 ** ((_HALVINGS + 1) * (step - 1) // self.steps)
