"""The portable backend: samples folded into channels, so that torch's convolution needs no transposed tokens.

A contiguous (H, W, B·C) tensor is one image with B·C channels in channels-last format. Folding copies rows of C numbers
and transposes no token; a single sample is not copied at all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sit_atconv.ops.precision import accumulation_dtype
from sit_atconv.ops.registration import closed_to_compiler, register_operator


def fold(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (1, B·C, H, W) with channels last in memory, in the accumulation dtype."""
    image = x.to(accumulation_dtype(x.dtype)).permute(1, 2, 0, 3).flatten(2)
    # Torch recognises channels last by all strides, even that of an axis of length one: unsqueeze(0) must come first.
    return image.unsqueeze(0).permute(0, 3, 1, 2)


def _unfold(image: Tensor, like: Tensor) -> Tensor:
    """The inverse of `fold`: a contiguous tensor with the shape and dtype of `like`."""
    B, _, _, C = like.shape
    rows = image.permute(0, 2, 3, 1).squeeze(0).unflatten(2, (B, C))
    return rows.permute(2, 0, 1, 3).to(like.dtype).contiguous()


def _weight(kernels: Tensor) -> Tensor:
    """(B, C, K, K) -> (B·C, 1, K, K), in the accumulation dtype."""
    return kernels.to(accumulation_dtype(kernels.dtype)).flatten(0, 1).unsqueeze(1)


def _forward(x: Tensor, kernels: Tensor) -> Tensor:
    weight = _weight(kernels)
    return _unfold(F.conv2d(fold(x), weight, padding=kernels.shape[-1] // 2, groups=len(weight)), x)


def convolution_gradients(
    dy: Tensor, image: Tensor, weight: Tensor, of_image: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Gradients of a depthwise convolution with respect to its image (1, C, H, W) and weight (C, 1, K, K)."""
    padding = weight.shape[-1] // 2
    dimage, dweight, _ = torch.ops.aten.convolution_backward(
        dy,
        image,
        weight,
        bias_sizes=None,
        stride=[1, 1],
        padding=[padding, padding],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=len(weight),
        output_mask=[of_image, True, False],
    )
    return dimage, dweight


def _backward(dy: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = convolution_gradients(fold(dy), fold(x), _weight(kernels))
    return _unfold(dx, x), dweight.view(kernels.shape).to(kernels.dtype).contiguous()


_operator = register_operator("depthwise_folded", _forward, _backward)


def folded_convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """One convolution with a group for every sample and channel of x (B, H, W, C)."""
    if closed_to_compiler():  # a compiler would change the memory layout
        return _operator(x, kernels)
    return _forward(x, kernels)
