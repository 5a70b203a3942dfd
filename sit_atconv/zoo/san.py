"""SAN with patchwise self-attention (Zhao et al. 2020, arXiv 2004.13621), also with ACmix's convolution path."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, register_notrace_module
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from sit_atconv.models.mixers.acmix.neighbourhood import mirrored
from sit_atconv.zoo.acmix import ImageShiftedSum
from sit_atconv.zoo.layers import require_size
from sit_atconv.zoo.pyramid import Pyramid
from sit_atconv.zoo.registration import build, image_cfg

_WIDTHS, _KERNELS = (64, 256, 512, 1024, 2048), (3, 7, 7, 7, 7)
_SHARE = 8  # channels of the values that share a weight
_PIECES = 4  # of the values, each as wide as q and k


@register_notrace_module
class PatchwiseAttention(nn.Module):
    """Weights for all k² neighbours are computed from q here and all their k together: (B, C, H, W) -> (B, M, H, W).

    With q, k of C/16 channels and v of M: w = conv_w(q, k of the k² neighbours), k²·M/8 numbers for each position, and
    y_c = Σ_neighbours w_{c mod M/8} v_c. Neighbours beyond the border are mirrored, repeatedly on small maps.
    """

    def __init__(self, dim: int, mid: int, size: int) -> None:
        super().__init__()
        keys, weights = dim // 16, mid // _SHARE
        self.size, self.share = size, _SHARE
        self.q, self.k, self.v = nn.Conv2d(dim, keys, 1), nn.Conv2d(dim, keys, 1), nn.Conv2d(dim, mid, 1)
        self.weights = nn.Sequential(
            nn.BatchNorm2d(keys * (size**2 + 1)),
            nn.ReLU(),
            nn.Conv2d(keys * (size**2 + 1), weights, 1, bias=False),
            nn.BatchNorm2d(weights),
            nn.ReLU(),
            nn.Conv2d(weights, size**2 * weights, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.q(x), self.k(x), self.v(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The weighted sums of v (B, M, H, W)."""
        batch, mid, height, width = v.shape
        weights = self.weights(torch.cat([q, self._neighbours(k)], 1))
        weights = weights.reshape(batch, 1, mid // self.share, self.size * self.size, height, width)
        values = self._neighbours(v).reshape(batch, self.share, mid // self.share, self.size * self.size, height, width)
        return (weights * values).sum(3).reshape(v.shape)

    def _neighbours(self, x: Tensor) -> Tensor:
        """The k² neighbours of each position of x (B, C, H, W), channel by channel: (B, C·k², H, W)."""
        reach, height, width = self.size // 2, x.shape[2], x.shape[3]
        rows = mirrored(torch.arange(-reach, height + reach, device=x.device), height)
        columns = mirrored(torch.arange(-reach, width + reach, device=x.device), width)
        padded = x.index_select(2, rows).index_select(3, columns)
        return F.unfold(padded, (self.size, self.size)).reshape(x.shape[0], -1, height, width)


@register_notrace_module
class ACmixPatchwise(nn.Module):
    """α · patchwise attention + β · the convolution path on the same q, k, v (arXiv 2111.14556, App. C).

    q and k are one group of M/4 maps each, v four; nine mixtures of these six are shifted and summed. The release has
    no SAN: this form gives the paper's operations (docs/zoo.md).
    """

    def __init__(self, dim: int, mid: int, size: int) -> None:
        super().__init__()
        self.attention = PatchwiseAttention(dim, mid, size)
        self.convolution = ImageShiftedSum(mid, _PIECES, bias=False)
        self.convolution.fc = nn.Linear(_PIECES + 2, 9, bias=False)
        self.alpha, self.beta = nn.Parameter(torch.full((1,), 0.5)), nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention.q(x), self.attention.k(x), self.attention.v(x)
        convolution = self.convolution(torch.cat([q, k, v], 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.alpha * self.attention.attend(q, k, v) + self.beta * convolution


class Bottleneck(nn.Module):
    """BN, ReLU, self-attention, BN, ReLU, 1×1, and a residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, size: int, acmix: bool) -> None:
        super().__init__()
        mid = dim // 4
        self.bn1, self.bn2 = nn.BatchNorm2d(dim), nn.BatchNorm2d(mid)
        self.sa = (ACmixPatchwise if acmix else PatchwiseAttention)(dim, mid, size)
        self.conv = nn.Conv2d(mid, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.bn2(self.sa(F.relu(self.bn1(x))))))


class SANStage(nn.Module):
    """2×2 max pooling, a 1×1 convolution to the stage's width, bottlenecks, BN and ReLU."""

    def __init__(self, before: int, dim: int, size: int, depth: int, acmix: bool) -> None:
        super().__init__()
        self.pool, self.conv = nn.MaxPool2d(2), nn.Conv2d(before, dim, 1, bias=False)
        self.blocks = nn.Sequential(*(Bottleneck(dim, size, acmix) for _ in range(depth)))
        self.bn = nn.BatchNorm2d(dim)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return F.relu(self.bn(x))


class Stem(nn.Module):
    """1×1 convolution to 64 channels, BN and ReLU. Images of fewer than 32 pixels along a side raise `InputError`."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(in_channels, 64, 1, bias=False), nn.BatchNorm2d(64)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            require_size(x, 32)
        return F.relu(self.bn(self.conv(x)))


class SAN(Pyramid):
    """Images (B, in_chans, H, W), H, W >= 32 -> logits (B, num_classes). Sizes that 32 does not divide lose a border.

    Args:
        depths: bottlenecks of each of the five stages.
        acmix: ACmix's convolution path beside self-attention.
        num_classes, in_chans, global_pool, drop_rate: as in timm.

    Raises:
        InputError: for smaller images.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 1, 2, 4, 1),
        acmix: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.dims, self.num_classes, self.in_chans, self.drop_rate = _WIDTHS, num_classes, in_chans, drop_rate
        sizes = zip((64, *_WIDTHS), _WIDTHS, _KERNELS, depths, strict=False)
        stages = [SANStage(before, dim, size, depth, acmix) for before, dim, size, depth in sizes]
        self.assemble(Stem(in_chans), stages, nn.Identity(), reductions=(2, 4, 8, 16, 32))
        self.head = ClassifierHead(_WIDTHS[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)


_CFG = image_cfg("stem.conv", interpolation="bilinear")
_DEPTHS = {10: (2, 1, 2, 4, 1), 15: (3, 2, 3, 5, 2), 19: (3, 3, 4, 6, 3)}
default_cfgs = generate_default_cfgs(
    {f"san{depth}.untrained": {**_CFG, "paper_ids": "arXiv:2004.13621"} for depth in _DEPTHS}
    | {f"acmix_san{depth}.untrained": {**_CFG, "paper_ids": "arXiv:2111.14556"} for depth in _DEPTHS}
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], options: dict[str, Any]) -> SAN:
    return build(SAN, variant, pretrained, defaults, options, stages=5)


@register_model
def san10(pretrained: bool = False, **options: Any) -> SAN:
    """11,841,124 parameters."""
    return _create("san10", pretrained, {"depths": _DEPTHS[10]}, options)


@register_model
def san15(pretrained: bool = False, **options: Any) -> SAN:
    """16,181,310 parameters."""
    return _create("san15", pretrained, {"depths": _DEPTHS[15]}, options)


@register_model
def san19(pretrained: bool = False, **options: Any) -> SAN:
    """20,518,470 parameters."""
    return _create("san19", pretrained, {"depths": _DEPTHS[19]}, options)


@register_model
def acmix_san10(pretrained: bool = False, **options: Any) -> SAN:
    """11,994,612 parameters."""
    return _create("acmix_san10", pretrained, {"depths": _DEPTHS[10], "acmix": True}, options)


@register_model
def acmix_san15(pretrained: bool = False, **options: Any) -> SAN:
    """16,414,134 parameters."""
    return _create("acmix_san15", pretrained, {"depths": _DEPTHS[15], "acmix": True}, options)


@register_model
def acmix_san19(pretrained: bool = False, **options: Any) -> SAN:
    """20,829,278 parameters."""
    return _create("acmix_san19", pretrained, {"depths": _DEPTHS[19], "acmix": True}, options)
