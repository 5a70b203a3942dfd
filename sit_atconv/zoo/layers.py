"""Layers of the image networks. Maps are (B, H, W, C) within blocks, so that 1×1 convolutions are matrix products."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn

from sit_atconv.errors import InputError


@register_notrace_function
def require_size(x: Tensor, smallest: int) -> None:
    """Raise `InputError` unless images x (B, C, H, W) have `smallest` pixels along both sides."""
    if x.shape[-2] < smallest or x.shape[-1] < smallest:
        raise InputError(
            f"This network takes images of {smallest}×{smallest} pixels or more, not {x.shape[-2]}×{x.shape[-1]}."
        )


class ChannelNorm(nn.Module):
    """Divide x (..., C) by its size over channels, times a learnt weight, eps 1e-6.

    Args:
        dim: width C.
        by: "rms", the root mean square; or "std", the (unbiased) standard deviation, which timm's RmsNorm2d computed
            from 1.0.10 to 1.0.12: weights that were trained so need it.
    """

    def __init__(self, dim: int, by: str = "rms") -> None:
        super().__init__()
        self.dim, self.by, self.eps = dim, by, 1e-6
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x) * self.weight

    def scale(self, x: Tensor) -> Tensor:
        """One over the size of each position, (..., 1). The sum of squares itself would leave fp16."""
        if self.by == "std":
            return torch.rsqrt(x.var(-1, keepdim=True) + self.eps)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / self.dim**0.5
        return torch.rsqrt(size.square() + self.eps)


class ConvGLU(nn.Module):
    """Gated linear unit with a depthwise 3×3 convolution in the gate (TransNeXt, arXiv 2311.17132).

    (B, H, W, C) -> (B, H, W, C): with a, v = Linear(x), of m channels each, Linear(norm(GELU(conv(a)) · v)).

    Args:
        dim, hidden: widths C and m.
        norm: "rms" or "std" for a `ChannelNorm` of the product, None for none.
        drop: dropout of the product and of the result.
    """

    def __init__(self, dim: int, hidden: int, norm: str | None = None, drop: float = 0.0) -> None:
        super().__init__()
        self.hidden = hidden
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = ChannelNorm(hidden, norm) if norm else None
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        m = self.hidden  # a product for each half: the convolution would copy a part of a joint result
        gate = F.linear(x, self.fc1.weight[:m], self.fc1.bias[:m])
        value = F.linear(x, self.fc1.weight[m:], self.fc1.bias[m:])
        product = F.gelu(self.dwconv(gate.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).mul_(value)
        if self.norm is None:
            return self.drop(self.fc2(self.drop(product)))
        # The norm's weight goes into the matrix, and its scale, one number a position, onto the narrower result.
        y = F.linear(self.drop(product), self.fc2.weight * self.norm.weight)
        return self.drop(y * self.norm.scale(product) + self.fc2.bias)


class PatchEmbed(nn.Module):
    """Patches of p×p to vectors, and LayerNorm: (B, C_in, H, W) -> (B, C, H/p, W/p).

    Where p does not divide H or W, the last rows or columns are left out, or the map is padded by zeros with `pad`.
    Raises `InputError` for images with fewer than `smallest` pixels along a side.
    """

    def __init__(self, in_channels: int, dim: int, patch: int, pad: bool = False, smallest: int = 1) -> None:
        super().__init__()
        self.patch, self.pad, self.smallest = patch, pad, smallest
        self.proj, self.norm = nn.Conv2d(in_channels, dim, patch, patch), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            require_size(x, self.smallest)
        if self.pad:
            x = F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchMerging(nn.Module):
    """Four neighbours to one position of twice the width (Swin, arXiv 2103.14030).

    (B, C, H, W) -> (B, 2C, ⌈H/2⌉, ⌈W/2⌉); odd maps are padded by zeros.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)).permute(0, 2, 3, 1)
        top, bottom = x[:, 0::2], x[:, 1::2]
        x = torch.cat([top[:, :, 0::2], bottom[:, :, 0::2], top[:, :, 1::2], bottom[:, :, 1::2]], -1)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


def conv_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    """3×3 convolution of stride 2 without bias, and BatchNorm: (B, C_in, H, W) -> (B, C_out, ⌈H/2⌉, ⌈W/2⌉)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out_channels)
    )


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """For each stage the rates of its blocks, which rise linearly from 0 in the first block to `rate` in the last."""
    count, blocks = sum(depths), iter(range(sum(depths)))
    return [[rate * next(blocks) / max(count - 1, 1) for _ in range(depth)] for depth in depths]


def initialise(module: nn.Module) -> None:
    """Weights of convolutions and Linears: normal with std 0.02, cut at ±2; their biases 0. For `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialise_linear(module: nn.Module) -> None:
    """As `initialise`, for Linears only: convolutions keep torch's default, as in Swin and PVT."""
    if isinstance(module, nn.Linear):
        initialise(module)
