"""Presets: networks with the preprocessing for which numbers are published, by the names that --features takes.

dinov2: FDD and KDD as in dgm-eval (Stein et al. 2023, arXiv 2306.04675). cmmd: CMMD (Jayasumana et al. 2024, arXiv
2401.09603) as its PyTorch port computes it. fdr-…: the spaces of FDr6 besides Inception (arXiv 2604.28190).
"""

from collections.abc import Iterable
from typing import Literal

from sit_atconv.errors import InputError, nearest
from sit_atconv.evaluation.features.networks import Preset, require_model

_FDD = (
    "FD and KID on DINOv2 come from timm's network, which resamples position embeddings with its own filter: compare "
    "them with numbers of this program only."
)
_CMMD = (
    "CMMD comes from timm's CLIP, which was not compared with the original weights: compare it with numbers of this "
    "program only."
)
_FDR = (
    "Published FDr6 comes from bfloat16 features of images that were never rounded to bytes. These are features of "
    "bytes, in fp32 unless --fast was given: how far that moves the ratios was not measured."
)


def _fdr(space: str, model: str, size: int | None = None, features: Literal["pooled", "mean"] = "pooled") -> Preset:
    """A space of FDr6; networks that are given a size resample their position embeddings for it."""
    return Preset(
        model, f"_fdr-{space}", size, resize="floats", padded=size is not None, remarks=(_FDR,), features=features
    )


PRESETS = {
    "dinov2": Preset("vit_large_patch14_dinov2.lvd142m", "_dinov2", 224, remarks=(_FDD,)),
    "cmmd": Preset(
        "vit_large_patch14_clip_quickgelu_336.openai", "_clip336", crop=True, features="projection", remarks=(_CMMD,)
    ),
    "fdr-convnext": _fdr("convnext", "convnextv2_base.fcmae_ft_in22k_in1k", features="mean"),  # 224 is its own size
    "fdr-dinov2": _fdr("dinov2", "vit_large_patch14_dinov2.lvd142m", 256),
    "fdr-mae": _fdr("mae", "vit_large_patch16_224.mae", 224),
    "fdr-siglip2": _fdr("siglip2", "vit_so400m_patch16_siglip_256.v2_webli", 224),
    "fdr-clip": _fdr("clip", "vit_large_patch14_clip_224.openai", 256),
}

# The Fréchet distances between ImageNet's validation and training sets (256 px) by which FDr6 divides, as published.
# MAE's has one digit: its ratio is uncertain by 12 %.
FDR_DIVISORS = {
    "inception": 1.68,
    "fdr-convnext": 56.87,
    "fdr-dinov2": 14.19,
    "fdr-mae": 0.04,
    "fdr-siglip2": 0.60,
    "fdr-clip": 5.60,
}

GROUPS = {"fdr6": tuple(FDR_DIVISORS)}
_SUFFIXES = {"inception": "", "pixels": "_pixels"}  # features that are no timm network


def expand(names: Iterable[str]) -> list[str]:
    """The names with groups replaced by their members, in order: "fdr6" is Inception and five more.

    Raises `InputError` for an unknown name, for one given twice, and for two whose metrics have the same names.
    """
    expanded = [member for name in names for member in GROUPS.get(name, (name,))]
    owners: dict[str, str] = {}
    for name in expanded:
        suffix = _SUFFIXES[name] if name in _SUFFIXES else find_preset(name).suffix
        if owners.get(suffix) == name:
            inside = [group for group in GROUPS if name in GROUPS[group]]
            also = f" ('{inside[0]}' stands for {', '.join(GROUPS[inside[0]])})" if inside else ""
            raise InputError(f"Features '{name}' are given twice{also}: give them once.")
        if suffix in owners:
            raise InputError(
                f"Metrics on '{owners[suffix]}' and on '{name}' would have the same names (…{suffix}): evaluate them "
                "one after the other."
            )
        owners[suffix] = name
    return expanded


def find_preset(name: str) -> Preset:
    """The preset of a name, or the one for "timm:MODEL". Raises `InputError` for an unknown name.

    Any timm model gets whole images at its own size, resized on bytes, and gives pooled features. DINOv2 models get
    224 x 224 and give their class token, as in dgm-eval, whose k = 5 and 10,000 points per side are used for precision
    and recall of all networks.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name.startswith("timm:"):
        model = name.removeprefix("timm:")
        require_model(model)
        return Preset(model, "_dinov2", 224, remarks=(_FDD,)) if "dinov2" in model else Preset(model, f"_{model}")
    if name in GROUPS:
        raise InputError(f"'{name}' stands for several features ({', '.join(GROUPS[name])}): name one of them.")
    known = (*_SUFFIXES, *PRESETS, *GROUPS)
    raise InputError(f"Unknown features '{name}': {nearest(name, known)} Or give timm:MODEL.")
