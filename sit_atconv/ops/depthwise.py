"""Depthwise convolution with one kernel per sample and channel (ATConv, arXiv 2510.20092, Eq. 11)."""

import os

from torch import Tensor

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.ops.folded import folded_convolution
from sit_atconv.ops.fused import fused_convolution
from sit_atconv.ops.grouped import grouped_convolution
from sit_atconv.ops.precision import autocast_inputs
from sit_atconv.ops.selection import TRITON_INSTALLED, choose_backend
from sit_atconv.ops.separate import separate_convolution
from sit_atconv.ops.shifted import shifted_sums

BACKENDS = {
    "grouped": grouped_convolution,
    "folded": folded_convolution,
    "separate": separate_convolution,
    "shifted": shifted_sums,
    "triton": fused_convolution,
}


def per_sample_depthwise_conv2d(x: Tensor, kernels: Tensor, backend: str = "auto") -> Tensor:
    """Convolve every channel of every sample with its own K×K kernel, zero padding ⌊K/2⌋, stride 1.

    As in all deep-learning libraries, this is a cross-correlation: y[h, w] = Σ_uv kernel[u, v] · x[h+u−p, w+v−p].
    Sums are accumulated in fp32 (fp64 for fp64). Every backend is differentiable twice. Autocast casts both arguments.

    Args:
        x: (B, H, W, C), any floating dtype.
        kernels: (B, C, K, K), K odd, of x's dtype.
        backend: "grouped" (torch's grouped convolution, the reference), "folded" (the same, channels last), "separate"
            (one call per sample), "shifted" (multiply-adds for torch.compile to fuse), "triton" (CUDA), or "auto", the
            backend that was measured to be the fastest (`sit_atconv.ops.selection`).

    Returns:
        (B, H, W, C) of x's dtype.

    Raises:
        InputError: for shapes or dtypes that do not match, an even K, an unknown backend, or Triton where it does not
            run.
    """
    require_one_of(backend, ["auto", *BACKENDS], "backend")
    if x.ndim != 4 or kernels.ndim != 4:
        raise InputError(f"Expected x (B, H, W, C) and kernels (B, C, K, K), not {x.ndim} and {kernels.ndim} axes.")
    B, C, K = x.shape[0], x.shape[-1], kernels.shape[-1]
    if kernels.shape != (B, C, K, K) or K % 2 == 0:
        raise InputError(
            f"x of shape {tuple(x.shape)} and kernels of shape {tuple(kernels.shape)} do not match: "
            "expected (B, H, W, C) and (B, C, K, K) with K odd."
        )
    x, kernels = autocast_inputs(x, kernels)
    if x.dtype != kernels.dtype or not x.is_floating_point():
        raise InputError(f"x is {x.dtype}, the kernels are {kernels.dtype}: give both the same floating dtype.")
    if backend == "auto":
        backend = choose_backend(x, kernels)
        require_one_of(backend, BACKENDS, "backend in SIT_ATCONV_DEPTHWISE")
    if backend == "triton":
        _require_triton(x)
    if B == 0:  # torch refuses a convolution with zero groups
        backend = "shifted"
    return BACKENDS[backend](x, kernels)


def _require_triton(x: Tensor) -> None:
    if not TRITON_INSTALLED:
        raise InputError("The backend 'triton' needs the package triton: install it or choose another backend.")
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            "The backend 'triton' runs on a GPU, and x is on the CPU: choose another backend, "
            "or set TRITON_INTERPRET=1 before Python starts to run it, slowly, on the CPU."
        )
