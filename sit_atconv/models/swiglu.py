"""The gated MLP of LightningDiT's blocks: SwiGLU (Shazeer 2020, arXiv 2002.05202, Eq. 6)."""

import torch.nn.functional as F
from torch import Tensor, nn

from sit_atconv.errors import InputError

MLPS = ("gelu", "swiglu")


class SwiGLU(nn.Module):
    """W₃(silu(W₁x) ⊙ W₂x), all with biases: (..., dim) -> (..., dim).

    W₁ and W₂ are the rows of one matrix, and are initialised as one: `w12` (2h, dim) for the inner width h. h is two
    thirds of `hidden`, rounded down, so that it has as many parameters as an MLP of the width `hidden`, within 0.05 %.

    Raises:
        InputError: when nothing is left of the width.
    """

    matrices = {"w12": 2}

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        inner = 2 * hidden // 3
        if inner < 1:
            raise InputError(f"SwiGLU takes two thirds of the MLP's width, which is only {hidden}: raise mlp_ratio.")
        self.w12, self.w3 = nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)
