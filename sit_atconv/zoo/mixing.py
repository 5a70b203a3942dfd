"""Token mixers in image networks: maps (B, H, W, C), and what TorchScript and FX need of them."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, register_notrace_module
from torch import Tensor, nn

from sit_atconv.models.mixers import ATConv, create_mixer
from sit_atconv.models.mixers.registry import check_options
from sit_atconv.zoo.acmix import ImageACmix


@register_notrace_module
class ImageATConv(ATConv):
    """ATConv that TorchScript can compile: there, in torch's own operators; otherwise unchanged."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if torch.jit.is_scripting():
            return self._scripted(x, grid[0], grid[1])
        else:  # TorchScript compiles the whole function unless this is a branch
            return ATConv.forward(self, x, grid)

    def _scripted(self, x: Tensor, height: int, width: int) -> Tensor:
        """`forward` of the configuration of the paper: generated kernels, both projections, inhibition of Eq. 9."""
        batch, positions, channels = x.shape
        size = self.kernel_size
        if self.pool == "grid":
            image = x.transpose(1, 2).reshape(batch, channels, height, width)
            context = F.adaptive_avg_pool2d(image, (size, size)).flatten(2).transpose(1, 2)
        else:
            context = F.adaptive_avg_pool1d(x.transpose(1, 2), size * size).transpose(1, 2)
        context = self.kernel_proj(context)
        if self.activation == "silu":
            context = F.silu(context)
        else:
            context = F.gelu(context, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        kernels = self.kernel_gen(context.transpose(1, 2))
        kernels = kernels - self.inhibition.sigmoid().unsqueeze(-1) * kernels.mean(-1, keepdim=True)
        values = self.value_proj(x).transpose(1, 2).reshape(1, batch * channels, height, width)
        kernels = kernels.reshape(batch * channels, 1, size, size)
        y = F.conv2d(values, kernels, padding=size // 2, groups=batch * channels)
        return self.out_proj(y.reshape(batch, channels, positions).transpose(1, 2))


@register_notrace_module
class Opaque(nn.Module):
    """A mixer that FX keeps whole and that TorchScript leaves to Python (so a file of TorchScript cannot hold it)."""

    __jit_ignored_attributes__ = ("mixer",)

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    @torch.jit.ignore
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.mixer(x, grid)

    @torch.jit.ignore
    def initialise(self) -> None:
        """The mixer's own initialisation, if it has one."""
        if hasattr(self.mixer, "initialise"):
            self.mixer.initialise()


def create_image_mixer(entry: str | dict[str, Any], dim: int, num_heads: int = 1, **defaults: Any) -> nn.Module:
    """A registered mixer, by name or as {"name": …, option: …}: (B, N, C), grid (H, W) -> (B, N, C).

    `defaults` are options of ATConv that the entry does not set. Raises `InputError` as `create_mixer` does.
    """
    options = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = options.pop("name")
    if (
        name == "acmix"
        and not {"rates", "shift_module"} & options.keys()
        and ("window" in options or "neighbourhood" in options)
    ):
        return ImageACmix(dim, num_heads, **check_options(name, options))
    if name != "atconv":
        return Opaque(create_mixer(name, dim, num_heads, **options))
    options = check_options(name, {**defaults, **options})
    ablated = {"kernels", "value", "out", "inhibition"} & options.keys()
    return Opaque(ATConv(dim, **options)) if ablated else ImageATConv(dim, **options)


class MixingBlock(nn.Module):
    """x += γ₁ mixer(LN(x)), x += γ₂ mlp(LN(x)) on maps (B, H, W, C), each at random left out in training.

    Args:
        mixer: mixes tokens (B, N, C) on a grid.
        mlp: mixes channels of maps (B, H, W, C).
        dim: width C.
        eps: of both norms.
        layer_scale: initial value of γ, a number for each channel; None for none.
        drop_path: probability of leaving a branch out, for each sample.
    """

    def __init__(
        self,
        mixer: nn.Module,
        mlp: nn.Module,
        dim: int,
        eps: float = 1e-6,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        scale = partial(LayerScale, dim, layer_scale) if layer_scale else lambda: None
        self.norm1, self.mixer, self.scale1 = nn.LayerNorm(dim, eps=eps), mixer, scale()
        self.norm2, self.mlp, self.scale2 = nn.LayerNorm(dim, eps=eps), mlp, scale()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(self.norm1(x).flatten(1, 2), (x.shape[1], x.shape[2])).reshape(x.shape)
        mixed = self.drop_path(mixed)
        x = x + mixed if self.scale1 is None else torch.addcmul(x, mixed, self.scale1.gamma)
        mixed = self.drop_path(self.mlp(self.norm2(x)))
        return x + mixed if self.scale2 is None else torch.addcmul(x, mixed, self.scale2.gamma)


def initialise_mixers(model: nn.Module) -> None:
    """The mixers' own initialisation, where they have one: after that of the network, which draws everything anew."""
    for module in model.modules():
        if isinstance(module, MixingBlock) and hasattr(module.mixer, "initialise"):
            module.mixer.initialise()
