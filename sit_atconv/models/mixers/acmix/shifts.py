"""The convolution path of ACmix: nine mixtures of queries, keys and values are shifted and summed."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SHIFT_MODULES = ("learned", "random", "fixed", "tensor")
TAPS = 9  # k_c² for the kernel size 3 of the paper


class ShiftedSum(nn.Module):
    """Mix, shift and sum (arXiv 2111.14556, Eq. 7-8 and Fig. 3): q, k, v (B, H, W, 3C) -> (B, H, W, C).

    1. q, k, v are 3h maps of d channels; `fc` mixes them into nine maps f_uv, in the same way for all channels.
    2. The nine maps are shifted in the nine directions of a 3×3 kernel, with zeros beyond the border, and summed:
       Σ_uv f_uv[c, i+u−1, j+v−1]. A group convolution with d groups, from nine maps to h outputs each, does this when
       its kernels have a single one at the place of the shift.

    The output channel c·h + n is the n-th output of channel c: its order differs from that of the attention path,
    n·d + c, as in the released code.

    `shift_module` is a row of Table 7: "learned" (kernels are trained and start as shifts), "random" (trained, with
    torch's own start), "fixed" (a convolution with the kernels of shifts) or "tensor" (the same function by slices).
    The last two repeat the one sum of each channel h times.
    """

    matrices = {"fc": 0}

    def __init__(self, dim: int, num_heads: int, bias: bool, shift_module: str) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.shift_module = shift_module
        self.fc = nn.Linear(3 * num_heads, TAPS, bias=bias)
        if shift_module in ("learned", "random"):
            self.shift = nn.Conv2d(TAPS * self.head_dim, dim, 3, padding=1, groups=self.head_dim, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """Let learned kernels start as shifts."""
        if self.shift_module == "learned":
            with torch.no_grad():
                self.shift.weight.copy_(shift_kernels(self.shift.weight))

    def forward(self, qkv: Tensor) -> Tensor:
        # (B, H, W, d, 9) is an image of 9d channels in channels-last format.
        maps = self.fc(qkv.unflatten(-1, (self.fc.in_features, self.head_dim)).mT)
        if self.shift_module == "tensor":
            return shifted_sum(maps).repeat_interleave(self.num_heads, dim=-1)
        image = rearrange(maps, "b i j c t -> b (c t) i j")
        if torch.compiler.is_compiling():  # Inductor fails on the gradient if channels are last and grids vary
            image = image.contiguous()
        if self.shift_module == "fixed":
            kernels = shift_kernels(image.new_empty(self.dim, TAPS, 3, 3))
            y = F.conv2d(image, kernels, padding=1, groups=self.head_dim)
        else:
            y = self.shift(image)
        return y.permute(0, 2, 3, 1)

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: the nine mixtures, and the convolution unless slices take its place."""
        mixtures, convolution = 3 * TAPS * self.dim, TAPS**2 * self.dim
        return 2 * grid[0] * grid[1] * (mixtures + (0 if self.shift_module == "tensor" else convolution))


def shift_kernels(like: Tensor) -> Tensor:
    """Kernels that shift map uv by (u − 1, v − 1) and sum the nine maps (Eq. 15): (C, 9, 3, 3), the shape of `like`."""
    return torch.eye(TAPS, dtype=like.dtype, device=like.device).view(TAPS, 3, 3).expand(like.shape)


def shifted_sum(maps: Tensor) -> Tensor:
    """Σ_uv maps[b, i+u−1, j+v−1, c, 3u+v] with zeros beyond the border: (B, H, W, d, 9) -> (B, H, W, d)."""
    _, H, W, _, _ = maps.shape
    padded = F.pad(maps, (0, 0, 0, 0, 1, 1, 1, 1))
    return sum(padded[:, u : u + H, v : v + W, :, 3 * u + v] for u in range(3) for v in range(3))
