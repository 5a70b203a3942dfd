"""Linear attention with a ReLU kernel, as in SANA (arXiv 2410.10629) and LiT (arXiv 2501.12976)."""

from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.models.mixers.attend import merge_heads, require_heads, split_heads
from sit_atconv.models.mixers.convolutions.depthwise import DepthwiseConv
from sit_atconv.models.mixers.registry import register_mixer
from sit_atconv.ops.precision import accumulation_dtype, without_autocast

EPSILON = 1e-15  # SANA's: a query whose ReLUs are all zero gives 0


@register_mixer("linear")
class LinearAttention(nn.Module):
    """Attention with weights relu(q_i)·relu(k_j) / Σ_j: (B, N, C), grid (H, W) -> (B, N, C), any H, W >= 1.

    Per head, S = Σ_j k_j v_jᵀ, z = Σ_j k_j and y_i = q_iᵀ S / (q_iᵀ z + ε), with q and k after their ReLU; then
    y += a depthwise convolution of v (LiT), and a projection. 4C² + 4C + (k² + 1) C parameters.

    Args:
        dim, num_heads: width C and heads h; SANA has C/32 heads.
        kernel_size: side k of the depthwise convolution, odd; LiT's is 5; 0 for none, as in SANA.
        qk_norm: an RMS norm with weights over all channels of q and of k, before the ReLU (SANA's option).
        qkv_bias: whether q, k, v have biases; SANA has none.

    Raises:
        InputError: when `num_heads` does not divide `dim`, or for an even kernel.
    """

    matrices = {"qkv": 3}

    def __init__(
        self, dim: int, num_heads: int, kernel_size: int = 5, qk_norm: bool = False, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        if kernel_size < 0 or (kernel_size and kernel_size % 2 == 0):
            raise InputError(f"kernel_size must be odd, or 0 for no convolution, not {kernel_size}.")
        self.dim, self.num_heads, self.kernel_size = dim, num_heads, kernel_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(dim, eps=1e-5) if qk_norm else None for _ in range(2))
        self.depthwise = DepthwiseConv(dim, kernel_size) if kernel_size else None
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_norm is not None:  # in the dtype of its weights, which autocast does not change
            q, k = (norm(part.to(norm.weight.dtype)) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        y = merge_heads(relu_attention(*(split_heads(part, self.num_heads) for part in (q, k, v))))
        if self.depthwise is not None:
            y = y + self.depthwise(v, grid)
        return self.out_proj(y)

    def flops(self, grid: tuple[int, int]) -> int:
        """Operations for one image: four projections, S, the two products with q, and the convolution."""
        N, C, d = grid[0] * grid[1], self.dim, self.dim // self.num_heads
        return 2 * (4 * N * C**2 + 2 * N * C * d + N * C + self.kernel_size**2 * N * C)


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """y_i = q_iᵀ S / (q_iᵀ z + ε) for heads q, k, v (B, h, N, d) before the ReLU, in v's dtype.

    S, z and the quotient are in fp32: in fp16 the sums overflow and ε is zero, in bf16 they lose digits.
    """
    wide = accumulation_dtype(v.dtype)
    with without_autocast(v.device):
        q, k = (part.to(wide).relu() for part in (q, k))
        S = k.mT @ v.to(wide)  # (B, h, d, d)
        z = k.sum(-2).unsqueeze(-1)  # (B, h, d, 1)
        return (q @ S / (q @ z + EPSILON)).to(v.dtype)
