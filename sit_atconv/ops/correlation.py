"""The per-sample depthwise convolution's derivative by its kernels, as an operation of its own."""

import torch
from torch import Tensor

from sit_atconv.ops.folded import convolution_gradients, fold
from sit_atconv.ops.precision import accumulation_dtype
from sit_atconv.ops.shifted import shifted_sums


def depthwise_kernel_gradient(x: Tensor, dy: Tensor, kernel_size: int) -> Tensor:
    """The kernels' gradient for y = per_sample_depthwise_conv2d(x, kernels) and the gradient dy of y.

    G[b, c, u, v] = Σ_hw dy[b, h, w, c] · x[b, h+u−p, w+v−p, c], p = ⌊K/2⌋, for any kernels, since y is linear in them.
    Differentiable twice and in forward mode.

    Args:
        x, dy: (B, H, W, C), of one dtype.
        kernel_size: K, odd.

    Returns:
        (B, C, K, K) in fp32, in which it is summed; fp64 for fp64.
    """
    B, _, _, C = x.shape
    kernels = x.new_zeros(B, C, kernel_size, kernel_size, dtype=accumulation_dtype(x.dtype))
    if torch.compiler.is_compiling() or B == 0:
        # Fused into one pass. Inductor fails on the derivatives of torch's gradient when grids vary.
        return torch.func.vjp(lambda kernels: shifted_sums(x, kernels), kernels)[1](dy)[0]
    images = [fold(tensor) for tensor in (dy, x)]
    if x.is_cuda:  # torch's depthwise kernels are for channels first, as in the backend "grouped"
        images = [image.contiguous() for image in images]
    weight = kernels.flatten(0, 1).unsqueeze(1)
    return convolution_gradients(*images, weight, of_image=False)[1].view(kernels.shape)
