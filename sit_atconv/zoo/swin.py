"""Swin's pyramid (arXiv 2103.14030) with ATConv (arXiv 2510.20092, Table II) or ACmix in place of window attention."""

from collections.abc import Sequence
from typing import Any

from timm.layers import ClassifierHead, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import nn

from sit_atconv.errors import require_one_of
from sit_atconv.zoo.layers import PatchEmbed, PatchMerging, conv_norm, drop_path_rates, initialise_linear
from sit_atconv.zoo.mixing import MixingBlock, create_image_mixer, initialise_mixers
from sit_atconv.zoo.pyramid import Pyramid, Stage
from sit_atconv.zoo.registration import build, image_cfg

DOWNSAMPLES = ("conv", "merge")
_EPS = 1e-5  # of all of Swin's norms


class SwinPyramid(Pyramid):
    """Images (B, in_chans, H, W), any H, W >= 1 -> logits (B, num_classes).

    Patches of 4×4, four stages of pre-norm blocks with MLPs of ratio 4, a final norm, the mean over positions.

    Args:
        depths, dim: blocks of each stage; width of the first, doubled by each of the others.
        mixers: the mixers of the blocks of a stage, repeated in turn: by name or as {"name": …, option: …}.
        num_heads: heads in each stage, for mixers that have heads.
        downsample: "conv", a 3×3 convolution of stride 2 and BatchNorm, which alone reproduces the parameters and
            operations of the ATConv paper's Table II; or "merge", Swin's own.
        pool: ATConv's pooling, "grid" (the paper) or "raster".
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: as in timm.
        img_size: ignored, since no part is bound to a size.

    Raises:
        InputError: for an unknown mixer, option or downsampling.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dim: int = 96,
        mixers: Sequence[str | dict[str, Any]] = ("atconv",),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        downsample: str = "conv",
        pool: str = "grid",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        require_one_of(downsample, DOWNSAMPLES, "downsample")
        self.dims = tuple(dim * 2**stage for stage in range(len(depths)))
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        rates = drop_path_rates(drop_path_rate, depths)

        def block(stage: int, number: int) -> MixingBlock:
            width = self.dims[stage]
            mixer = create_image_mixer(mixers[number % len(mixers)], width, num_heads[stage], pool=pool)
            return MixingBlock(mixer, Mlp(width, 4 * width), width, _EPS, drop_path=rates[stage][number])

        def between(stage: int) -> nn.Module:
            if stage == 0:
                return nn.Identity()
            before = self.dims[stage - 1]
            return conv_norm(before, 2 * before) if downsample == "conv" else PatchMerging(before)

        stages = [
            Stage(between(stage), [block(stage, number) for number in range(depth)])
            for stage, depth in enumerate(depths)
        ]
        norm = LayerNorm2d(self.dims[-1], eps=_EPS)
        self.assemble(PatchEmbed(in_chans, dim, 4, pad=True), stages, norm, reductions=(4, 8, 16, 32))
        self.head = ClassifierHead(self.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(initialise_linear)
        initialise_mixers(self)


_CFG = image_cfg("stem.proj", crop_pct=0.9)
_SIZES = {
    "tiny": {"depths": (2, 2, 6, 2), "dim": 96, "num_heads": (3, 6, 12, 24)},
    "small": {"depths": (2, 2, 18, 2), "dim": 96, "num_heads": (3, 6, 12, 24)},
    "base": {"depths": (2, 2, 18, 2), "dim": 128, "num_heads": (4, 8, 16, 32)},
}
_ACMIX = {"downsample": "merge", "mixers": [{"name": "acmix", "window": 7, "shift": shift} for shift in (0, 3)]}
default_cfgs = generate_default_cfgs(
    {f"atconv_swin_{size}.untrained": {**_CFG, "paper_ids": "arXiv:2510.20092"} for size in _SIZES}
    | {f"acmix_swin_{size}.untrained": {**_CFG, "paper_ids": "arXiv:2111.14556"} for size in ("tiny", "small")}
)


@register_model
def atconv_swin_tiny(pretrained: bool = False, **options: Any) -> SwinPyramid:
    """28,042,240 parameters (26,109,568 with downsample="merge")."""
    return build(SwinPyramid, "atconv_swin_tiny", pretrained, _SIZES["tiny"], options)


@register_model
def atconv_swin_small(pretrained: bool = False, **options: Any) -> SwinPyramid:
    """47,567,416 parameters (45,634,744 with downsample="merge")."""
    return build(SwinPyramid, "atconv_swin_small", pretrained, _SIZES["small"], options)


@register_model
def atconv_swin_base(pretrained: bool = False, **options: Any) -> SwinPyramid:
    """84,164,312 parameters (80,727,256 with downsample="merge")."""
    return build(SwinPyramid, "atconv_swin_base", pretrained, _SIZES["base"], options)


@register_model
def acmix_swin_tiny(pretrained: bool = False, **options: Any) -> SwinPyramid:
    """28,649,908 parameters."""
    return build(SwinPyramid, "acmix_swin_tiny", pretrained, {**_SIZES["tiny"], **_ACMIX}, options)


@register_model
def acmix_swin_small(pretrained: bool = False, **options: Any) -> SwinPyramid:
    """50,345,080 parameters."""
    return build(SwinPyramid, "acmix_swin_small", pretrained, {**_SIZES["small"], **_ACMIX}, options)
