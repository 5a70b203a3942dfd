"""The test-time-training layer of ViT³ (arXiv 2512.01643): two small networks that are fitted to each image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sit_atconv.models.mixers.attend import merge_heads, require_heads, split_heads
from sit_atconv.models.mixers.registry import register_mixer
from sit_atconv.ops import depthwise_kernel_gradient, per_sample_depthwise_conv2d
from sit_atconv.ops.precision import accumulation_dtype

LOSS_SCALE = 1 / 3  # s, in both branches: (3·3)^-½


@register_mixer("ttt")
class TTT(nn.Module):
    """Fit a network to the image's keys and values, then ask it with the queries: (B, N, C), grid (H, W) -> (B, N, C).

    Each branch has learnt weights, from which one gradient step on the loss −s Σ_n ⟨F(k_n), v_n⟩ / N leads to weights
    of the image; y = F(q) with these. A gradient is divided by its length + 1. Derivatives pass through the step.

    * Branch 1, per head of d channels: F(x) = (x W1) ⊙ SiLU(x W2). The length is that of a column, over its inputs.
    * Branch 2, on d channels more: F is a depthwise 3×3 convolution w. The loss is linear in w, so the gradient is that
      of the per-sample operator by its kernels, whatever w is. The length is that of a kernel. The result is ATConv's
      operator with another generator: a static kernel plus the correlation of k and v at nine offsets.

    Both results together are projected. 4C² + 6Cd + 4C + 12d parameters; any H, W >= 1.

    Raises:
        InputError: when `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        self.dim, self.num_heads, self.head = dim, num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim + 3 * self.head)  # q, k, v of branch 1, then of branch 2
        self.matrices = {"qkv": (dim,) * 3 + (self.head,) * 3}
        self.w1, self.w2 = (nn.Parameter(torch.empty(num_heads, self.head, self.head)) for _ in range(2))
        self.w = nn.Parameter(torch.empty(self.head, 3, 3))
        for weight in (self.w1, self.w2, self.w):
            nn.init.trunc_normal_(weight, std=0.02)
        self.out_proj = nn.Linear(dim + self.head, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v, *maps = self.qkv(x).split([self.dim] * 3 + [self.head] * 3, dim=-1)
        y1 = merge_heads(self.fitted_glu(*(split_heads(part, self.num_heads) for part in (q, k, v))))
        y2 = self.fitted_convolution(*(part.unflatten(1, grid) for part in maps)).flatten(1, 2)
        return self.out_proj(torch.cat([y1, y2], dim=-1))

    def fitted_glu(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Branch 1 for q, k, v (B, h, N, d): (B, h, N, d)."""
        z1, z2 = k @ self.w1, k @ self.w2
        sigmoid = z2.sigmoid()
        step = -LOSS_SCALE / k.shape[-2]  # after the sums: v / N would vanish in fp16
        g1 = k.mT @ (v * F.silu(z2))
        g2 = k.mT @ (v * z1 * (sigmoid * (1 + z2 * (1 - sigmoid))))
        w1, w2 = (stepped(w, g, step, dim=(-2,)) for w, g in ((self.w1, g1), (self.w2, g2)))
        return (q @ w1.to(q.dtype)) * F.silu(q @ w2.to(q.dtype))

    def fitted_convolution(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Branch 2 for q, k, v (B, H, W, d): (B, H, W, d)."""
        H, W = k.shape[1:3]
        kernels = stepped(self.w, depthwise_kernel_gradient(k, v, 3), -LOSS_SCALE / (H * W), dim=(-2, -1))
        return per_sample_depthwise_conv2d(q, kernels.to(q.dtype))

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: projections, six products with d×d matrices, a convolution and its gradient."""
        N, C, d = grid[0] * grid[1], self.dim, self.head
        return 2 * N * (4 * C**2 + 10 * C * d + 18 * d)


def stepped(weight: Tensor, gradient: Tensor, scale: float, dim: tuple[int, ...]) -> Tensor:
    """weight − G / (‖G‖ + 1) for G = scale · gradient, with lengths over `dim`, in fp32 (fp64 for fp64)."""
    G = gradient.to(accumulation_dtype(gradient.dtype)) * scale
    return weight - G / (torch.linalg.vector_norm(G, dim=dim, keepdim=True) + 1)
