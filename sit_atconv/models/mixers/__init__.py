"""Token mixers: modules that take tokens (B, N, C) and their grid (H, W) and return (B, N, C)."""

from torch import nn

from sit_atconv.errors import require_one_of
from sit_atconv.models.mixers.atconv import ATConv
from sit_atconv.models.mixers.attention import Attention

MIXERS = ("attention", "atconv")


def create_mixer(name: str, dim: int, num_heads: int, kernel_size: int, pool: str, activation: str) -> nn.Module:
    """Build the mixer called `name` ("attention" or "atconv") for tokens of width `dim`; InputError for other names."""
    require_one_of(name, MIXERS, "mixer")
    if name == "attention":
        return Attention(dim, num_heads)
    return ATConv(dim, kernel_size, pool, activation)


__all__ = ["MIXERS", "ATConv", "Attention", "create_mixer"]
