"""Token mixers: modules that take tokens (B, N, C) and their grid (H, W) and return (B, N, C); see docs/mixers.md."""

from sit_atconv.models.mixers.acmix import ACmix
from sit_atconv.models.mixers.atconv import ATConv
from sit_atconv.models.mixers.attention import Attention
from sit_atconv.models.mixers.local_attention.window import Window
from sit_atconv.models.mixers.pattern import describe_pattern, expand_pattern, with_atconv_options
from sit_atconv.models.mixers.plugins import import_plugins
from sit_atconv.models.mixers.registry import create_mixer, list_mixers, mixer_flops, register_mixer

__all__ = [
    "ACmix",
    "ATConv",
    "Attention",
    "Window",
    "create_mixer",
    "describe_pattern",
    "expand_pattern",
    "import_plugins",
    "list_mixers",
    "mixer_flops",
    "register_mixer",
    "with_atconv_options",
]
