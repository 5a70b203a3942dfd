"""Named models: SiT-<Mixer>-{S, B, L, XL}/{1, 2, 4, 8}, with attention plain SiT; mixtures by `mixer_pattern`."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from sit_atconv.errors import InputError, nearest
from sit_atconv.models.mixers.pattern import (
    QUERY_OPTIONS,
    expand_pattern,
    mixer_names,
    with_atconv_options,
    with_query_options,
)
from sit_atconv.models.mixers.plugins import import_offered
from sit_atconv.models.mixers.registry import list_mixers, mixer_options
from sit_atconv.models.sit import SiT

# How mixers are spelt in names of models, where capitalising the first letter is not enough
SPELLING = {
    "acmix": "ACmix",
    "atconv": "ATConv",
    "dico": "DiCo",
    "dwconv": "DWConv",
    "inline": "InLine",
    "rankaug": "RankAug",
    "ttt": "TTT",
}
# Where one mixer with its defaults is not what the name means
PATTERNS = {"window": ["window", {"name": "window", "shift": mixer_options("window")["window"] // 2}]}
FAMILIES = {"SiT": "attention", "SiT-Hybrid": "hybrid"} | {
    f"SiT-{SPELLING.get(mixer, mixer.capitalize())}": PATTERNS.get(mixer, mixer)
    for mixer in list_mixers()
    if mixer != "attention"
}
SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PATCHES = (1, 2, 4, 8)

_CONFIGS = {
    f"{family}-{size}/{patch}": {"mixer_pattern": pattern, "patch_size": patch, **shape}
    for family, pattern in FAMILIES.items()
    for size, shape in SIZES.items()
    for patch in PATCHES
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models, or of those that match a shell pattern such as ``"SiT-ATConv-*/2"``."""
    return [name for name in _CONFIGS if fnmatch.fnmatchcase(name, pattern)]


def create_model(
    name: str,
    input_size: int | Sequence[int] = 32,
    in_channels: int = 4,
    num_classes: int = 1000,
    **overrides: Any,
) -> SiT:
    """Build the model called `name` with fresh weights; `overrides` are further arguments of `SiT`.

    ATConv's options (kernel_size, pool, …) may be given as well: they apply to every ATConv whose entry in the pattern
    does not set them. So may `qk_norm` and `rope`, which apply to attention and window in the same way. Raises
    `InputError` for an unknown name, argument, mixer or option.
    """
    if name not in _CONFIGS:
        raise InputError(f"Unknown model '{name}': {nearest(name, _CONFIGS)} `list_models()` names all.")
    config = {**_CONFIGS[name], "input_size": input_size, "in_channels": in_channels, "num_classes": num_classes}
    atconv = {key: overrides.pop(key) for key in mixer_options("atconv") if key in overrides}
    queries = {key: overrides.pop(key) for key in QUERY_OPTIONS if key in overrides}
    unknown = set(overrides) - set(SiT.__init__.__wrapped__.__annotations__)
    if unknown:
        raise InputError(f"SiT has no argument {', '.join(sorted(unknown))}.")
    config |= overrides
    config["mixer_pattern"] = with_query_options(with_atconv_options(config["mixer_pattern"], atconv), queries)
    import_offered(mixer_names(expand_pattern(config["mixer_pattern"], config["depth"])))
    return SiT(**config)
