"""PVT's pyramid (arXiv 2102.12122) with ATConv in place of attention (arXiv 2510.20092, Table II).

Class token, position embeddings and the convolutions that reduced keys and values are gone: only so the paper's four
parameter counts come out.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import ClassifierHead, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import nn

from sit_atconv.zoo.layers import PatchEmbed, drop_path_rates, initialise_linear
from sit_atconv.zoo.mixing import MixingBlock, create_image_mixer, initialise_mixers
from sit_atconv.zoo.pyramid import Pyramid, Stage
from sit_atconv.zoo.registration import build, image_cfg

DIMS, HEADS, RATIOS, PATCHES = (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), (4, 2, 2, 2)
DEPTHS = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}


class ATConvPVT(Pyramid):
    """Images (B, in_chans, H, W), H, W >= 32 -> logits (B, num_classes). Sizes that 32 does not divide lose a border.

    Args:
        depths: blocks of each stage.
        mixer: a registered token mixer, by name or as {"name": …, option: …}.
        pool: ATConv's pooling, "grid" (the paper) or "raster".
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: as in timm.
        img_size: ignored, since no part is bound to a size.

    Raises:
        InputError: for an unknown mixer or option, and for smaller images.
    """

    def __init__(
        self,
        depths: Sequence[int] = DEPTHS["tiny"],
        mixer: str | dict[str, Any] = "atconv",
        pool: str = "grid",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.dims, self.num_classes, self.in_chans, self.drop_rate = DIMS, num_classes, in_chans, drop_rate
        rates = drop_path_rates(drop_path_rate, depths)

        def block(stage: int, drop_path: float) -> MixingBlock:
            dim = DIMS[stage]
            token_mixer = create_image_mixer(mixer, dim, HEADS[stage], pool=pool)
            return MixingBlock(token_mixer, Mlp(dim, RATIOS[stage] * dim), dim, drop_path=drop_path)

        def between(stage: int) -> nn.Module:
            return PatchEmbed(DIMS[stage - 1], DIMS[stage], PATCHES[stage]) if stage else nn.Identity()

        stages = [Stage(between(stage), [block(stage, rate) for rate in rates[stage]]) for stage in range(len(DIMS))]
        norm = LayerNorm2d(DIMS[-1], eps=1e-6)
        stem = PatchEmbed(in_chans, DIMS[0], PATCHES[0], smallest=32)
        self.assemble(stem, stages, norm, reductions=(4, 8, 16, 32))
        self.head = ClassifierHead(DIMS[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(initialise_linear)
        initialise_mixers(self)


_CFG = image_cfg("stem.proj", crop_pct=0.9, paper_ids="arXiv:2510.20092")
default_cfgs = generate_default_cfgs({f"atconv_pvt_{size}.untrained": _CFG for size in DEPTHS})


@register_model
def atconv_pvt_tiny(pretrained: bool = False, **options: Any) -> ATConvPVT:
    """10,199,224 parameters."""
    return build(ATConvPVT, "atconv_pvt_tiny", pretrained, {"depths": DEPTHS["tiny"]}, options)


@register_model
def atconv_pvt_small(pretrained: bool = False, **options: Any) -> ATConvPVT:
    """18,318,280 parameters."""
    return build(ATConvPVT, "atconv_pvt_small", pretrained, {"depths": DEPTHS["small"]}, options)


@register_model
def atconv_pvt_medium(pretrained: bool = False, **options: Any) -> ATConvPVT:
    """31,886,080 parameters."""
    return build(ATConvPVT, "atconv_pvt_medium", pretrained, {"depths": DEPTHS["medium"]}, options)


@register_model
def atconv_pvt_large(pretrained: bool = False, **options: Any) -> ATConvPVT:
    """43,316,178 parameters."""
    return build(ATConvPVT, "atconv_pvt_large", pretrained, {"depths": DEPTHS["large"]}, options)
