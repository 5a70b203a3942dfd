"""A tiny model, its images, and when two draws count as the same."""

import numpy as np
import torch
from torch import nn

from sit_atconv import SiT, create_model
from sit_atconv.autoencoder import LatentSpec, load_autoencoder
from sit_atconv.sampling import SamplerSettings, generate

PIXELS = LatentSpec("identity", None, 1, 1, 1.0, 0.0)


def tiny_model(num_classes: int = 3, in_channels: int = 1, **options: object) -> SiT:
    """A hybrid of two narrow blocks with random weights everywhere, on pixels of 8x6."""
    torch.manual_seed(1)
    model = create_model(
        "SiT-Hybrid-S/2",
        input_size=(8, 6),
        in_channels=in_channels,
        num_classes=num_classes,
        hidden_size=16,
        depth=2,
        num_heads=2,
        **{"latents": PIXELS.to_dict(), **options},
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def images_of(model: SiT, indices: list[int], settings: SamplerSettings, **options: object) -> np.ndarray:
    batches = generate(model, load_autoencoder(PIXELS), indices, settings, **options)
    return torch.cat([batch.images for batch in batches]).numpy().astype(int)


def require_same_images(a: np.ndarray, b: np.ndarray) -> None:
    """One grey level at most, on one value in a thousand: what rounding may do to fp32."""
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
    assert (a != b).mean() <= 1e-3
