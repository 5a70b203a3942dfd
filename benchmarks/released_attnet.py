"""AttNet as the release of arXiv 2510.20092 computes it, under the release's names and channels first."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Channels(nn.Module):
    """A norm over the channels of (B, C, H, W)."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
            return x.permute(0, 3, 1, 2)
        size = x.square().mean(1, keepdim=True) if self.kind == "rms" else x.var(1, keepdim=True)
        return x / (size + 1e-6).sqrt() * self._column(self.weight)

    def _column(self, numbers: Tensor) -> Tensor:
        return numbers.reshape(1, -1, 1, 1)


class _Mixer(nn.Module):
    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.kernel_proj, self.x_proj, self.proj = (nn.Conv2d(dim, dim, 1) for _ in range(3))
        self.kernel_gen = nn.Linear(size**2, size**2)
        self.difference_control = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        context = F.gelu(F.adaptive_avg_pool1d(self.kernel_proj(x).flatten(2), self.size**2))
        kernels = self.kernel_gen(context)
        kernels = kernels - self.difference_control.sigmoid()[:, None] * kernels.mean(-1, keepdim=True)
        image, kernels = self.x_proj(x).reshape(1, B * C, H, W), kernels.reshape(B * C, 1, self.size, self.size)
        return self.proj(F.conv2d(image, kernels, padding=self.size // 2, groups=B * C).reshape(B, C, H, W))


class _Glu(nn.Module):
    def __init__(self, dim: int, expansion: int, norm: str | None) -> None:
        super().__init__()
        hidden = 2 * dim * expansion // 3
        self.fc1, self.fc2 = nn.Conv2d(dim, 2 * hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm_layer = _Channels(hidden, norm) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a, v = self.fc1(x).chunk(2, 1)
        return self.fc2(self.norm_layer(F.gelu(self.dwconv(a)) * v))


class _Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.reshape(1, -1, 1, 1)


class _Block(nn.Module):
    def __init__(self, dim: int, size: int, expansion: int, scale: bool, norm: str | None) -> None:
        super().__init__()
        self.token_mixer, self.channel_mixer = _Mixer(dim, size), _Glu(dim, expansion, norm)
        self.layer_scale_1, self.layer_scale_2 = (_Scale(dim) if scale else nn.Identity() for _ in range(2))
        self.norm_1, self.norm_2 = (_Channels(dim, "layer") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1(self.token_mixer(self.norm_1(x)))
        return x + self.layer_scale_2(self.channel_mixer(self.norm_2(x)))


def _down(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b))


class ReleasedAttNet(nn.Module):
    """Depths, widths, kernel sizes, whether there is a layer scale, and the norm in the channel mixers."""

    def __init__(
        self,
        depths: tuple[int, ...],
        dims: tuple[int, ...],
        sizes: tuple[int, ...] = (3, 3, 3, 3),
        scale: bool = True,
        norm: str | None = "rms",
        classes: int = 1000,
    ) -> None:
        super().__init__()
        stem = nn.Sequential(_down(3, dims[0] // 2), nn.GELU(), _down(dims[0] // 2, dims[0]))
        self.downsample_layers = nn.ModuleList([stem, *(_down(dims[i - 1], dims[i]) for i in range(1, 4))])
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Block(dims[i], sizes[i], (8, 8, 4, 4)[i], scale, norm) for _ in range(depths[i])))
            for i in range(4)
        )
        self.norm, self.head = nn.LayerNorm(dims[-1], eps=1e-5), nn.Linear(dims[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean((2, 3))))
