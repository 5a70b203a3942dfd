"""Norms of the blocks and of attention's queries and keys: LayerNorm as in DiT, or RMSNorm (arXiv 1910.07467)."""

from torch import nn

NORMS = ("layer", "rms")
_RMS_EPSILON = 1e-6  # LightningDiT's


def block_norm(kind: str, dim: int) -> nn.Module:
    """The norm of tokens (..., dim) before a modulation, computed in fp32.

    "layer": (x − mean) / √(variance + 1e-6), which learns nothing, as in DiT. "rms": g · x / √(mean x² + 1e-6), with a
    gain g (dim,) that is learnt from 1 (LightningDiT, arXiv 2501.01423).
    """
    if kind == "rms":
        return nn.RMSNorm(dim, eps=_RMS_EPSILON)
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def head_norm(kind: str, width: int) -> nn.Module:
    """qk-norm, over the channels of one head (..., width): "layer", with learnt gain and bias, or "rms".

    It bounds the scores of attention (Dehghani et al. 2023, arXiv 2302.05442); kinds and ε are LightningDiT's.
    """
    return nn.RMSNorm(width, eps=_RMS_EPSILON) if kind == "rms" else nn.LayerNorm(width, eps=1e-5)
