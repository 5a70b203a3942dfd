"""The edges between bytes and floats: images are uint8 outside the program and floats in [-1, 1] inside it."""

import torch
from torch import Tensor

from sit_atconv.errors import require_one_of

_OFFSETS = {"nearest": 128.0, "truncate": 127.5}


def to_uint8(images: Tensor, rounding: str = "nearest") -> Tensor:
    """Float images in [-1, 1] to uint8, any shape; values outside are clamped.

    `rounding="nearest"` is floor(127.5 x + 128), what ADM, DiT and SiT do; "truncate" is floor(127.5 x + 127.5), half
    a grey level darker on average, as REPA does: for comparison only.
    """
    require_one_of(rounding, _OFFSETS, "rounding")
    return (images.float() * 127.5 + _OFFSETS[rounding]).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]: x / 127.5 - 1, which `to_uint8` undoes exactly."""
    return images.float() / 127.5 - 1.0
