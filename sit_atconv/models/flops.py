"""How many floating-point operations training takes, counted from the shapes: a multiply-add is two.

Only products are counted (matrices, convolutions), as torch's own counter does.
"""

from collections.abc import Callable

from torch import nn

from sit_atconv.models import SiT
from sit_atconv.models.mixers import ATConv, Attention


def training_flops(model: SiT, latent_shape: tuple[int, int, int]) -> int:
    """Of one training step for one image (C, H, W): three forward passes, since the backward pass is worth two.

    What gradient checkpointing computes again is not counted, nor are teachers and projectors: these are the
    operations that the model needs, as in PaLM's definition of MFU (Chowdhery et al. 2022).
    """
    return 3 * forward_flops(model, latent_shape)


def forward_flops(model: SiT, latent_shape: tuple[int, int, int]) -> int:
    """Of one forward pass for one image of shape (C, H, W)."""
    channels, height, width = latent_shape
    N, p = height * width // model.patch_size**2, model.patch_size
    C = model.config.hidden_size
    once = [*model.time_embed, model.final.modulation, *(block.modulation for block in model.blocks)]
    vector = sum(2 * m.in_features * m.out_features for m in once if isinstance(m, nn.Linear))
    patches = 2 * 2 * N * C * channels * p**2  # in and out
    blocks = sum(mixer_flops(block.mixer, N, C) + _mlp_flops(block.mlp, N) for block in model.blocks)
    return vector + patches + blocks


def mixer_flops(mixer: nn.Module, tokens: int, dim: int) -> int:
    """Of one mixer for the tokens of one image. Raises `TypeError` for a mixer that nobody has counted."""
    count = _MIXERS.get(type(mixer))
    if count is None:
        raise TypeError(f"The operations of {type(mixer).__name__} are not counted: add it to {__name__}.")
    return count(mixer, tokens, dim)


def _attention_flops(mixer: Attention, N: int, C: int) -> int:
    return 2 * N * 4 * C**2 + 2 * 2 * N**2 * C  # four projections; scores and their use


def _atconv_flops(mixer: ATConv, N: int, C: int) -> int:
    K2 = mixer.kernel_size**2
    kernels = K2 * C**2 + C * K2 * (K2 + 1)  # from the pooled context; a row for inhibition
    return 2 * (2 * N * C**2 + kernels + N * C * K2)  # values and output, kernels, their convolution


_MIXERS: dict[type[nn.Module], Callable[..., int]] = {Attention: _attention_flops, ATConv: _atconv_flops}


def _mlp_flops(mlp: nn.Module, N: int) -> int:
    return sum(2 * N * m.in_features * m.out_features for m in mlp.modules() if isinstance(m, nn.Linear))
