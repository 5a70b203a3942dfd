"""ACmix (arXiv 2111.14556): attention and convolution on the same queries, keys and values."""

from sit_atconv.models.mixers.acmix.mixer import ACmix
from sit_atconv.models.mixers.acmix.released import convert_acmix

__all__ = ["ACmix", "convert_acmix"]
