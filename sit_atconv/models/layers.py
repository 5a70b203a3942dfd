"""The layers of matrix products that all models are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sit_atconv.ops import linear, linear_gelu


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `sit_atconv.ops.linear`: twice as fast on some CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Linear, GELU approximated by tanh, Linear: (..., dim) -> (..., dim), the MLP of DiT's blocks."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or is_wrapped(self.fc1):
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))


def is_wrapped(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its product: LoRA, offloaded weights, hooks."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is not Linear or "forward" in vars(layer) or bool(hooks)
