"""Conversion between bytes and floats: images are uint8 outside the program and floats in [-1, 1] inside it."""

import torch
from torch import Tensor

from sit_atconv.errors import require_one_of

_OFFSETS = {"nearest": 128.0, "truncate": 127.5}


def to_uint8(images: Tensor, rounding: str = "nearest") -> Tensor:
    """Convert float images in [-1, 1], of any shape, to uint8; values outside are clamped.

    `rounding="nearest"` is floor(127.5 x + 128), as in ADM, DiT and SiT; "truncate" is floor(127.5 x + 127.5), as in
    REPA: half a grey level darker on average, for comparison only.
    """
    require_one_of(rounding, _OFFSETS, "rounding")
    return (images.float() * 127.5 + _OFFSETS[rounding]).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]: x / 127.5 - 1. `to_uint8` is the exact inverse."""
    return images.float() / 127.5 - 1.0
