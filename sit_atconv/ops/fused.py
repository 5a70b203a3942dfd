"""The CUDA backend: one Triton kernel for the forward pass, and one that computes both gradients in a single pass."""

import torch
from torch import Tensor

from sit_atconv.ops.precision import accumulation_dtype
from sit_atconv.ops.registration import is_transformed, register_operator
from sit_atconv.ops.shifted import shifted_sums

MAX_COLUMNS = 16  # of one Triton program; wider images are split


def _shared_arguments(x: Tensor, taps: Tensor, K: int) -> dict:
    """The arguments of both kernels for tokens (B, H, W, C) and taps (B, C, K²) of any strides."""
    import triton  # here and below: Triton is imported only where it runs

    _, H, W, C = x.shape
    dtype = triton.language.float64 if x.dtype == torch.float64 else triton.language.float32
    sample_stride, channel_stride, tap_stride = taps.stride()
    return {
        "H": H,
        "W": W,
        "C": C,
        "sample_stride": sample_stride,
        "channel_stride": channel_stride,
        "tap_stride": tap_stride,
        "K": K,
        "BLOCK_W": min(triton.next_power_of_2(W), MAX_COLUMNS),
        "dtype": dtype,
    }


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _forward(x: Tensor, kernels: Tensor) -> Tensor:
    from sit_atconv.ops.triton_kernels import forward_kernel

    x = x.contiguous()
    B, H, W, C = x.shape
    taps = kernels.flatten(2)  # copies only where a view is impossible
    arguments, y = _shared_arguments(x, taps, kernels.shape[-1]), torch.empty_like(x)
    columns = _cdiv(W, arguments["BLOCK_W"])
    with torch.cuda.device_of(x):
        forward_kernel[lambda chosen: (B * _cdiv(H, chosen["ROWS"]) * columns * _cdiv(C, chosen["BLOCK_C"]),)](
            x, taps, y, **arguments
        )
    return y


def _backward(dy: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    from sit_atconv.ops.triton_kernels import backward_kernel

    dy, x = dy.contiguous(), x.contiguous()
    B, _, W, C = x.shape
    K = kernels.shape[-1]
    taps = kernels.flatten(2)
    arguments, dx = _shared_arguments(x, taps, K), torch.empty_like(x)
    columns = _cdiv(W, arguments["BLOCK_W"])
    partial = x.new_empty(B, columns, K * K, C, dtype=accumulation_dtype(x.dtype))
    with torch.cuda.device_of(x):
        backward_kernel[lambda chosen: (B * columns * _cdiv(C, chosen["BLOCK_C"]),)](
            dy, x, taps, dx, partial, **arguments
        )
    dkernels = partial.sum(1).to(kernels.dtype).transpose(1, 2).contiguous()
    return dx, dkernels.view(kernels.shape)


_operator = register_operator("depthwise_triton", _forward, _backward)


def fused_convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """One program for each block of rows, columns and channels of every sample of x (B, H, W, C)."""
    return shifted_sums(x, kernels) if is_transformed() else _operator(x, kernels)
