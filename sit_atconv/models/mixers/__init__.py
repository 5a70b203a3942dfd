"""Token mixers: modules that take tokens (B, N, C) and their grid (H, W) and return (B, N, C); see docs/mixers.md."""

from sit_atconv.models.mixers.acmix import ACmix
from sit_atconv.models.mixers.atconv import ATConv
from sit_atconv.models.mixers.attention import Attention
from sit_atconv.models.mixers.convolutions.conv import Conv
from sit_atconv.models.mixers.convolutions.dico import DiCo
from sit_atconv.models.mixers.convolutions.dwconv import DWConv
from sit_atconv.models.mixers.linear_attention.hydra import Hydra
from sit_atconv.models.mixers.linear_attention.inline import InLine
from sit_atconv.models.mixers.linear_attention.linear import LinearAttention
from sit_atconv.models.mixers.linear_attention.rankaug import RankAugmented
from sit_atconv.models.mixers.linear_attention.ttt import TTT
from sit_atconv.models.mixers.local_attention.strided import Strided
from sit_atconv.models.mixers.local_attention.window import Window
from sit_atconv.models.mixers.pattern import describe_pattern, expand_pattern, mixer_names, with_atconv_options
from sit_atconv.models.mixers.plugins import import_plugins
from sit_atconv.models.mixers.registry import create_mixer, list_mixers, mixer_flops, register_mixer

__all__ = [
    "TTT",
    "ACmix",
    "ATConv",
    "Attention",
    "Conv",
    "DWConv",
    "DiCo",
    "Hydra",
    "InLine",
    "LinearAttention",
    "RankAugmented",
    "Strided",
    "Window",
    "create_mixer",
    "describe_pattern",
    "expand_pattern",
    "import_plugins",
    "list_mixers",
    "mixer_flops",
    "mixer_names",
    "register_mixer",
    "with_atconv_options",
]
