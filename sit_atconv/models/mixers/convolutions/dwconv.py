"""A depthwise convolution, alone or between two projections (Table IX of arXiv 2510.20092)."""

from torch import Tensor, nn

from sit_atconv.models.mixers.convolutions.depthwise import DepthwiseConv
from sit_atconv.models.mixers.registry import register_mixer


@register_mixer("dwconv")
class DWConv(nn.Module):
    """A static K×K kernel for each channel: (B, N, C), grid (H, W) -> (B, N, C), any H, W >= 1.

    y[h, w, c] = bias[c] + Σ_uv kernel[c, u, v] · x[h+u−p, w+v−p, c] with p = ⌊K/2⌋ and zeros outside. With projections
    it is ATConv with kernels that do not depend on the image.

    Args:
        dim: width C.
        kernel_size: K, odd; the paper has 3, 5 and 7.
        projections: whether the convolution stands between two linear layers.

    Raises:
        InputError: for an even kernel size.
    """

    def __init__(self, dim: int, kernel_size: int = 3, projections: bool = False) -> None:
        super().__init__()
        self.dim, self.kernel_size, self.projections = dim, kernel_size, projections
        self.value_proj = nn.Linear(dim, dim) if projections else nn.Identity()
        self.conv = DepthwiseConv(dim, kernel_size)
        self.out_proj = nn.Linear(dim, dim) if projections else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.out_proj(self.conv(self.value_proj(x), grid))

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: the convolution, and the projections if there are any."""
        N, C = grid[0] * grid[1], self.dim
        return 2 * (self.kernel_size**2 * N * C + 2 * self.projections * N * C**2)
