"""The portable backend for large images: one call of torch's convolution per sample.

A contiguous (H, W, C) tensor is an image in channels-last format, so tokens are read without a copy; results are copied
once, into one batch. For small images the cost of a call per sample outweighs the gain.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sit_atconv.ops.folded import convolution_gradients
from sit_atconv.ops.precision import accumulation_dtype
from sit_atconv.ops.registration import closed_to_compiler, register_operator


def _split(tensor: Tensor) -> list[Tensor]:
    """Samples (1, …) in the accumulation dtype. A single sample is not split, since that would copy its gradient."""
    tensor = tensor.to(accumulation_dtype(tensor.dtype))
    return [tensor] if len(tensor) == 1 else list(tensor.split(1))


def _join(samples: list[Tensor], like: Tensor) -> Tensor:
    """Samples (1, …) concatenated to one contiguous batch, in the dtype of `like`."""
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
    """One convolution for every sample of x (B, H, W, C), with a group for every channel."""
    if closed_to_compiler():  # a compiler would make a program for every batch size
        return _operator(x, kernels)
    return _forward(x, kernels)
