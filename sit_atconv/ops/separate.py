"""The portable backend for large images: every sample goes through torch's convolution by itself.

(H, W, C) contiguous is the channels-last form of one image, so tokens are read as they lie; results are moved once, to
stand side by side. Each sample costs a call, which small images are not worth.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sit_atconv.ops.folded import convolution_gradients
from sit_atconv.ops.precision import accumulation_dtype
from sit_atconv.ops.registration import closed_to_compiler, register_operator


def _split(tensor: Tensor) -> list[Tensor]:
    """Samples (1, …) in the dtype of sums; one alone is not split, whose gradient would be copied."""
    tensor = tensor.to(accumulation_dtype(tensor.dtype))
    return [tensor] if len(tensor) == 1 else list(tensor.split(1))


def _join(samples: list[Tensor], like: Tensor) -> Tensor:
    """Samples (1, …) side by side and contiguous, in the dtype of `like`."""
    return (samples[0] if len(samples) == 1 else torch.cat(samples)).to(like.dtype).contiguous()


def _images(x: Tensor) -> list[Tensor]:
    """(B, H, W, C) -> B times (1, C, H, W), channels last in memory."""
    return [sample.permute(0, 3, 1, 2) for sample in _split(x.contiguous())]


def _weights(kernels: Tensor) -> list[Tensor]:
    """(B, C, K, K) -> B times (C, 1, K, K)."""
    return [sample.transpose(0, 1) for sample in _split(kernels)]


def _forward(x: Tensor, kernels: Tensor) -> Tensor:
    C, K = x.shape[-1], kernels.shape[-1]
    pairs = zip(_images(x), _weights(kernels), strict=True)
    images = [F.conv2d(image, weight, padding=K // 2, groups=C) for image, weight in pairs]
    return _join([image.permute(0, 2, 3, 1) for image in images], x)


def _backward(dy: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    triples = zip(_images(dy), _images(x), _weights(kernels), strict=True)
    dimages, dweights = zip(*[convolution_gradients(*each) for each in triples], strict=True)
    dx = _join([dimage.permute(0, 2, 3, 1) for dimage in dimages], x)
    return dx, _join([dweight.transpose(0, 1) for dweight in dweights], kernels)


_operator = register_operator("depthwise_separate", _forward, _backward)


def separate_convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """As many images as samples, each with a group for every channel of x (B, H, W, C)."""
    if closed_to_compiler():  # it would make a program of every batch size
        return _operator(x, kernels)
    return _forward(x, kernels)
