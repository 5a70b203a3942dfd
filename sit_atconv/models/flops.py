"""Floating-point operations of training, counted from the shapes; a multiply-add counts as two.

Only matrix products and convolutions are counted, as in torch's own counter.
"""

from torch import nn

from sit_atconv.models.block import Block
from sit_atconv.models.mixers import mixer_flops
from sit_atconv.models.sit import SiT


def training_flops(model: SiT, latent_shape: tuple[int, int, int]) -> int:
    """Operations of a training step per image (C, H, W): three forward passes, since a backward pass costs two.

    The second head of Internal Guidance is part of them.
    Recomputation by gradient checkpointing, teachers and projectors are not counted: as in PaLM's definition of MFU
    (Chowdhery et al. 2022), these are the operations that the model needs.
    """
    return 3 * (forward_flops(model, latent_shape) + _internal_flops(model, latent_shape))


def forward_flops(model: SiT, latent_shape: tuple[int, int, int]) -> int:
    """Operations of one forward pass for one image (C, H, W)."""
    channels, height, width = latent_shape
    p, C = model.patch_size, model.config.hidden_size
    grid = height // p, width // p
    N = grid[0] * grid[1]
    once = sum(_linear_flops(module) for module in (model.time_embed, model.final.modulation))
    patches = 2 * 2 * N * C * channels * p**2  # in and out
    return once + patches + sum(block_flops(block, grid) for block in model.blocks)


def _internal_flops(model: SiT, latent_shape: tuple[int, int, int]) -> int:
    """Operations of the second head, if there is one, for one image (C, H, W)."""
    if model.internal is None:
        return 0
    _, height, width = latent_shape
    tokens = height * width // model.patch_size**2
    return tokens * _linear_flops(model.internal.proj) + _linear_flops(model.internal.modulation)


def block_flops(block: Block, grid: tuple[int, int]) -> int:
    """Operations of a block for one image of `grid` (H, W) tokens."""
    N, C = grid[0] * grid[1], block.modulation.in_features
    return mixer_flops(block.mixer, grid, C) + N * _linear_flops(block.mlp) + _linear_flops(block.modulation)


def _linear_flops(module: nn.Module) -> int:
    """Operations of all Linears in a module for one token."""
    return sum(2 * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
