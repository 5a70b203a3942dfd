"""Exponential moving average of the weights: what checkpoints offer and samples come from."""

import copy

import torch
from torch import nn


class Ema:
    """An fp32 copy of a model in eval mode, which follows it by `ema ← decay·ema + (1−decay)·model`."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step towards `model`, whose parameters come in the same order."""
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - self.decay)
