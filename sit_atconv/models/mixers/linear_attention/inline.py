"""InLine attention: injective linear attention (Han et al. 2024, arXiv 2412.06590)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sit_atconv.models.mixers.attend import merge_heads, require_heads, split_heads
from sit_atconv.models.mixers.registry import register_mixer
from sit_atconv.ops import per_sample_depthwise_conv2d
from sit_atconv.ops.precision import accumulation_dtype, without_autocast


@register_mixer("inline")
class InLine(nn.Module):
    """Linear attention whose weights sum to 1, and a 3×3 convolution made from the image: (B, N, C) -> (B, N, C).

    Per head, the weight of token j for token i is s q_i·k_j / N + (1 − s q_i·k̄) / N, s = d^-½, with means k̄, v̄ over
    tokens (the paper's φ is the identity). Each image and channel has a kernel, made from the mean of x over tokens by
    two Linears within each head, with a GELU between them; v convolved with it is added. Then a projection. This
    generator is a sibling of ATConv's. Any grid (H, W) works.

    4C² + C + 10Cd + 10C parameters, + 3C for biases of q, k, v, + 10C for LePE. The defaults are those that reproduce
    Table IX of the ATConv paper (arXiv 2510.20092).

    Args:
        dim, num_heads: width C and heads h, d = C/h.
        qkv_bias: whether q, k, v have biases.
        lepe: whether the image's kernels are added to static ones (LePE, arXiv 2107.00652).

    Raises:
        InputError: when `num_heads` does not divide `dim`.
    """

    matrices = {"qkv": 3}

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, lepe: bool = True) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.kernel_proj = nn.Conv1d(dim, dim, 1, groups=num_heads)  # a Linear within each head
        self.kernel_gen = nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
        # Drawn as torch draws those of a convolution of nine numbers
        self.lepe = nn.Parameter(torch.empty(dim, 3, 3).uniform_(-1 / 3, 1 / 3)) if lepe else None
        self.lepe_bias = nn.Parameter(torch.empty(dim).uniform_(-1 / 3, 1 / 3)) if lepe else None
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        y = merge_heads(injective_attention(*(split_heads(part, self.num_heads) for part in (q, k, v))))
        kernels = self.kernels(x)
        if self.lepe is not None:  # both kernels are convolved with v: added, they need one convolution
            kernels, y = kernels + self.lepe, y + self.lepe_bias
        local = per_sample_depthwise_conv2d(v.unflatten(1, grid), kernels.to(v.dtype)).flatten(1, 2)
        return self.out_proj((y + local).to(v.dtype))

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels made from tokens x (B, N, C): (B, C, 3, 3)."""
        context = F.gelu(self.kernel_proj(x.mean(1).unsqueeze(-1)))
        return self.kernel_gen(context).view(len(x), self.dim, 3, 3)

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: four projections, two products with d×d matrices, generator and convolution."""
        N, C, d = grid[0] * grid[1], self.dim, self.dim // self.num_heads
        return 2 * (4 * N * C**2 + 2 * N * C * d + 10 * C * d + 9 * N * C)


def injective_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Σ_j (s q_i·k_j + 1 − s q_i·k̄) v_j / N for heads q, k, v (B, h, N, d), in v's dtype; summed in fp32.

    The terms with k̄ centre the keys: y_i = v̄ + s q_iᵀ Σ_j (k_j − k̄) v_jᵀ / N, the covariance of keys and values.
    """
    N, d = q.shape[-2:]
    wide = accumulation_dtype(v.dtype)
    with without_autocast(v.device):
        q, k, values = (part.to(wide) for part in (q, k, v))
        covariance = (k - k.mean(-2, keepdim=True)).mT @ values * (d**-0.5 / N)  # (B, h, d, d)
        return (values.mean(-2, keepdim=True) + q @ covariance).to(v.dtype)
