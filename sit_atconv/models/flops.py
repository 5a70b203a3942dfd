"""Floating-point operations of training, counted from the shapes; a multiply-add counts as two.

Only matrix products and convolutions are counted, as in torch's own counter.
"""

from torch import nn

from sit_atconv.models.mixers import mixer_flops
from sit_atconv.models.sit import SiT


def training_flops(model: SiT, latent_shape: tuple[int, int, int]) -> int:
    """Operations of a training step per image (C, H, W): three forward passes, since a backward pass costs two.

    Recomputation by gradient checkpointing, teachers and projectors are not counted: as in PaLM's definition of MFU
    (Chowdhery et al. 2022), these are the operations that the model needs.
    """
    return 3 * forward_flops(model, latent_shape)


def forward_flops(model: SiT, latent_shape: tuple[int, int, int]) -> int:
    """Operations of one forward pass for one image (C, H, W)."""
    channels, height, width = latent_shape
    p, C = model.patch_size, model.config.hidden_size
    grid = height // p, width // p
    N = grid[0] * grid[1]
    once = [*model.time_embed, model.final.modulation, *(block.modulation for block in model.blocks)]
    vector = sum(2 * m.in_features * m.out_features for m in once if isinstance(m, nn.Linear))
    patches = 2 * 2 * N * C * channels * p**2  # in and out
    blocks = sum(mixer_flops(block.mixer, grid, C) + _mlp_flops(block.mlp, N) for block in model.blocks)
    return vector + patches + blocks


def _mlp_flops(mlp: nn.Module, N: int) -> int:
    return sum(2 * N * m.in_features * m.out_features for m in mlp.modules() if isinstance(m, nn.Linear))
