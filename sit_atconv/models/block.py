"""The adaLN-Zero transformer block and the final layer of DiT (Peebles & Xie 2022)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sit_atconv.errors import InputError
from sit_atconv.models.norms import block_norm
from sit_atconv.ops.precision import autocast_inputs


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale tokens x (B, N, C) by one vector (B, C) per sample, in one pass and in x's precision.

    The result has autocast's dtype where autocast is on, so that the matrix products that follow share one cast.
    """
    scale = 1 + scale.to(x.dtype).unsqueeze(1)  # in bf16, 1 + scale would round away a scale below 1/256
    return autocast_inputs(torch.addcmul(shift.to(x.dtype).unsqueeze(1), x, scale))[0]


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate · y for tokens x, y (B, N, C) and one gate (B, C) per sample, in x's dtype."""
    gate = gate.unsqueeze(1)
    if x.dtype == y.dtype:
        return torch.addcmul(x, gate, y)
    return x + gate * y  # under autocast addcmul would keep an fp32 copy of y for the backward pass


def take_rows(table: Tensor, rows: Tensor | None) -> Tensor:
    """Rows (B,) of a table (U, C): (B, C); the table itself if `rows` is None."""
    return table if rows is None else table[rows]


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), Linear: (..., dim) -> (..., dim), the MLP of DiT's blocks."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-Zero transformer block: mixer and MLP, each modulated and gated by the condition c.

    c is (B, C), or (1, C) shared by all samples, or (U, C) with `rows` (B,) as the index of each sample's condition. If
    `recompute_mixer` is set, the backward pass recomputes norm, modulation and mixer instead of storing activations.
    `norm` is one of `NORMS`.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, norm: str = "layer") -> None:
        super().__init__()
        self.norm1 = block_norm(norm, dim)
        self.mixer = mixer
        self.norm2 = block_norm(norm, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.modulation = nn.Linear(dim, 6 * dim)
        self.recompute_mixer = False

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int], rows: Tensor | None = None) -> Tensor:
        modulation = take_rows(self.modulation(c), rows)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        mix = self._mix
        if self.recompute_mixer and torch.is_grad_enabled():  # nothing in a mixer is random
            mix = partial(checkpoint, mix, use_reentrant=False, preserve_rng_state=False)
        x = add_gated(x, gate1, mix(x, shift1, scale1, grid))
        return add_gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))

    def _mix(self, x: Tensor, shift: Tensor, scale: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.mixer(modulate(self.norm1(x), shift, scale), grid)


class FinalLayer(nn.Module):
    """Modulated norm, then the projection of tokens (B, N, C) to patches (B, N, p²·C_out)."""

    def __init__(self, dim: int, patch_channels: int, norm: str = "layer") -> None:
        super().__init__()
        self.norm = block_norm(norm, dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, patch_channels)

    def forward(self, x: Tensor, c: Tensor, rows: Tensor | None = None) -> Tensor:
        shift, scale = take_rows(self.modulation(c), rows).chunk(2, dim=1)
        return self.proj(modulate(self.norm(x), shift, scale))


def internal_head(block: int, depth: int, dim: int, patch_channels: int, norm: str = "layer") -> FinalLayer:
    """The second final layer of Internal Guidance (arXiv 2512.24176), after `block` of `depth`: it begins as zero.

    It draws no random number that others would have drawn. Raises `InputError` for a block that cannot have one.
    """
    if not 1 <= block < depth:
        raise InputError(
            f"internal_block is {block}; Internal Guidance needs a block before the last of the {depth}, counted from "
            "1: its paper takes about a third of the depth, and 8 at most."
        )
    with torch.random.fork_rng(devices=[]):
        head = FinalLayer(dim, patch_channels, norm)
    for parameter in (*head.modulation.parameters(), *head.proj.parameters()):
        nn.init.zeros_(parameter)
    return head


def initialise_linears(model: nn.Module) -> None:
    """Weights of all linear layers by Xavier's uniform distribution, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
