"""SiT, REPA's SiT and the released ATConv as their programs compute them, transcribed from description for comparison.

Parameters have the names and shapes of ours, so that one state fits both, and the direction of time is ours. What the
originals do and we do not: patches by a strided convolution, time frequencies made anew and moved to the device in
every call, SiLU of the condition in every block, ATConv's three projections over all tokens and a grouped convolution
between transposes, hidden tokens folded for the projectors, torch's own linear layers and timm's MLP. Their four unused
output channels are left out.
"""

import copy
import math

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from sit_atconv.models import SiT
from sit_atconv.models.block import Block
from sit_atconv.models.layers import Linear
from sit_atconv.models.mixers import ATConv


def with_torchs_layers(module: nn.Module) -> nn.Module:
    """The module, its linear layers changed to torch's in place."""
    for child in module.modules():
        if isinstance(child, Linear):
            child.__class__ = nn.Linear
    return module


class ReleasedATConv(ATConv):
    """The same function as `ATConv`, computed as the released code does."""

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__(dim, kernel_size)
        with_torchs_layers(self)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        K = self.kernel_size
        context = F.adaptive_avg_pool2d(self.kernel_proj(x).transpose(1, 2).reshape(B, C, *grid), K).flatten(2)
        kernels = self.kernel_gen(F.gelu(context))
        kernels = kernels - torch.sigmoid(self.inhibition).view(1, C, 1) * kernels.mean(2, keepdim=True)
        values = self.value_proj(x).transpose(1, 2).reshape(1, B * C, *grid)
        y = F.conv2d(values, kernels.reshape(B * C, 1, K, K), padding=K // 2, groups=B * C)
        return self.out_proj(y.view(B, C, N).transpose(1, 2))


class ReleasedBlock(nn.Module):
    """DiT's block, of the parts of one of ours: every one applies SiLU to the condition and modulates for itself."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        with_torchs_layers(block)
        self.norm1, self.norm2, self.modulation, self.mixer = block.norm1, block.norm2, block.modulation, block.mixer
        hidden, dim = block.mlp.fc1.weight.shape
        self.mlp = Mlp(dim, hidden, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.mlp.load_state_dict(block.mlp.state_dict())
        if isinstance(block.mixer, ATConv):
            self.mixer = ReleasedATConv(dim, block.mixer.kernel_size)
            self.mixer.load_state_dict(block.mixer.state_dict())
        self.to(block.modulation.weight)  # its dtype and device

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, dim=1)
        y = self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1)
        x = x + gate1.unsqueeze(1) * self.mixer(y, grid)
        y = self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
        return x + gate2.unsqueeze(1) * self.mlp(y)


class ReleasedSiT(nn.Module):
    """SiT with the weights of one of ours, and REPA's projectors of the tokens after block `aligned`.

    The weights are copied; ATConv as by default: pooled over the grid, with GELU.
    """

    def __init__(self, model: SiT, projectors: nn.ModuleList | None = None, aligned: int = 0) -> None:
        super().__init__()
        model = with_torchs_layers(copy.deepcopy(model))
        self.num_classes, self.grid, self.patch_size = model.num_classes, model.grid, model.patch_size
        self.patch_embed, self.time_embed, self.label_embed = model.patch_embed, model.time_embed, model.label_embed
        self.blocks = nn.ModuleList(ReleasedBlock(block) for block in model.blocks)
        self.final = model.final
        self.position_table = model.position_table
        self.projectors, self.aligned = with_torchs_layers(copy.deepcopy(projectors or nn.ModuleList())), aligned

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The velocity at x (B, C, H, W), and the projected tokens (B, N, D) for each teacher."""
        B, channels, p = len(x), x.shape[1], self.patch_size
        weight = self.patch_embed.weight.view(-1, channels, p, p)
        tokens = F.conv2d(x, weight, self.patch_embed.bias, stride=p).flatten(2).transpose(1, 2) + self.position_table
        c = self._time(t) + self.label_embed(y)
        projected = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, c, self.grid)
            if number == self.aligned:
                folded = tokens.reshape(-1, tokens.shape[-1])
                projected = [project(folded).reshape(B, tokens.shape[1], -1) for project in self.projectors]
        shift, scale = self.final.modulation(F.silu(c)).chunk(2, dim=1)
        tokens = self.final.proj(self.final.norm(tokens) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        patches = tokens.reshape(B, *self.grid, p, p, channels)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(x.shape), projected

    def _time(self, t: Tensor) -> Tensor:
        half = self.time_embed.features // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
        angles = t[:, None].float() * frequencies[None]
        features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        first, activation, second = self.time_embed
        return second(activation(first(features.to(first.weight.dtype))))
