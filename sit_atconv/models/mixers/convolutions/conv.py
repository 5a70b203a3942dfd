"""A full convolution, from all channels to all channels (Table IX of arXiv 2510.20092)."""

from torch import Tensor, nn

from sit_atconv.models.mixers.convolutions.depthwise import require_odd
from sit_atconv.models.mixers.registry import register_mixer


@register_mixer("conv")
class Conv(nn.Module):
    """A static K×K convolution: (B, N, C), grid (H, W) -> (B, N, C), any H, W >= 1.

    y[h, w] = bias + Σ_uv W[u, v] · x[h+u−p, w+v−p] with C×C matrices W[u, v], p = ⌊K/2⌋ and zeros outside.

    Args:
        dim: width C.
        kernel_size: K, odd.

    Raises:
        InputError: for an even kernel size.
    """

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        require_odd(kernel_size)
        self.dim, self.kernel_size = dim, kernel_size
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)  # a channels-last view
        return self.conv(image).permute(0, 2, 3, 1).flatten(1, 2)

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations of the convolution for one image."""
        return 2 * self.kernel_size**2 * grid[0] * grid[1] * self.dim**2
