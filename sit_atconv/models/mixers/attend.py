"""softmax(q·kᵀ) v by the implementation that the user has chosen, and heads, for every mixer that attends."""

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from einops import rearrange
from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.ops.registration import is_exported


def require_heads(dim: int, num_heads: int) -> None:
    """Raise `InputError` unless `num_heads` divides the width."""
    if num_heads < 1 or dim % num_heads:
        raise InputError(f"The width {dim} is not a multiple of the {num_heads} attention heads.")


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, h·d) -> (B, h, N, d), a view."""
    return rearrange(x, "b n (h d) -> b h n d", h=num_heads)


def merge_heads(x: Tensor) -> Tensor:
    """(B, h, N, d) -> (B, N, h·d)."""
    return rearrange(x, "b h n d -> b n (h d)")


class Attend(nn.Module):
    """Scaled dot-product attention without weights of its own: q, k, v (B, h, N, d) -> (B, h, N, d).

    With `backend` None it is torch's fused attention, which has no forward-mode derivative; `SiT.set_attention_backend`
    chooses one of diffusers' backends instead ("_native_math" has that derivative).
    """

    def __init__(self) -> None:
        super().__init__()
        self.backend: AttentionBackendName | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """`mask`, broadcast to (B, h, N, N), is added to the scores: −∞ hides a key. `scale` is d^-½ by default."""
        if self.backend is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            if is_exported():  # exporters give it another memory layout, which later views must not see
                return y.clone(memory_format=torch.contiguous_format)
            return y
        heads = (part.transpose(1, 2) for part in (q, k, v))
        return dispatch_attention_fn(*heads, attn_mask=mask, scale=scale, backend=self.backend).transpose(1, 2)


def choose_attention(model: nn.Module, backend: AttentionBackendName | None) -> None:
    """Let everything in `model` attend by a backend of diffusers', or by torch's fused attention (None)."""
    for module in model.modules():
        if isinstance(module, Attend):
            module.backend = backend
