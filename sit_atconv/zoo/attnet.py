"""AttNet, the image classifier of the ATConv paper (arXiv 2510.20092, Table I), for timm: XXS, XS, S, T1 to T4.

The structure is that of the authors' release, which says more than the paper (docs/zoo.md lists the differences).
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers import LayerNorm2d, NormMlpClassifierHead, to_ntuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.zoo.layers import ConvGLU, conv_norm, drop_path_rates, initialise
from sit_atconv.zoo.mixing import MixingBlock, create_image_mixer, initialise_mixers
from sit_atconv.zoo.pyramid import Pyramid, Stage
from sit_atconv.zoo.registration import build, image_cfg, weights_in

_EXPANSIONS = (8, 8, 4, 4)  # of the channel mixers, by stage
_LAYER_SCALE = 1e-6  # at the start


class AttNet(Pyramid):
    """Images (B, in_chans, H, W), any H, W >= 1 -> logits (B, num_classes).

    Args:
        depths, dims: blocks and width of each of the four stages.
        mixer: a registered token mixer, by name or as {"name": …, option: …}.
        num_heads: heads of mixers that have heads: one number, or one for each stage.
        kernel_sizes: K of ATConv: one number, or one for each stage. Other mixers have their options in `mixer`.
        pool: ATConv's pooling: "raster" (the release, whose weights need it) or "grid" (the paper).
        glu_norm: norm within the channel mixers: "rms", "std" (see `ChannelNorm`) or None.
        layer_scale: initial value of γ; None for none.
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: as in timm.

    Raises:
        InputError: for an unknown mixer or option, kernel sizes or pooling of another mixer, heads that do not divide
            the width, or another number of stages.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 3, 12, 3),
        dims: Sequence[int] = (48, 96, 224, 384),
        mixer: str | dict[str, Any] = "atconv",
        num_heads: int | Sequence[int] = 1,
        kernel_sizes: int | Sequence[int] = 3,
        pool: str = "raster",
        glu_norm: str | None = "rms",
        layer_scale: float | None = _LAYER_SCALE,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(_EXPANSIONS):
            raise InputError(f"AttNet has four stages: give depths and dims for each, not {depths} and {dims}.")
        self.dims, self.num_classes, self.in_chans, self.drop_rate = tuple(dims), num_classes, in_chans, drop_rate
        sizes, heads = to_ntuple(len(dims))(kernel_sizes), to_ntuple(len(dims))(num_heads)
        rates = drop_path_rates(drop_path_rate, depths)
        name = mixer if isinstance(mixer, str) else mixer.get("name")
        if name != "atconv" and (set(sizes) != {3} or pool != "raster"):
            raise InputError(f"kernel_sizes and pool are ATConv's: give the options of '{name}' in mixer.")

        def block(stage: int, drop_path: float) -> MixingBlock:
            dim = dims[stage]
            token_mixer = create_image_mixer(mixer, dim, heads[stage], kernel_size=sizes[stage], pool=pool)
            glu = ConvGLU(dim, 2 * (dim * _EXPANSIONS[stage]) // 3, glu_norm)
            return MixingBlock(token_mixer, glu, dim, layer_scale=layer_scale, drop_path=drop_path)

        stem = nn.Sequential(conv_norm(in_chans, dims[0] // 2), nn.GELU(), conv_norm(dims[0] // 2, dims[0]))
        downsamples = [nn.Identity(), *(conv_norm(a, b) for a, b in pairwise(dims))]
        stages = [
            Stage(downsample, [block(number, rate) for rate in rates[number]])
            for number, downsample in enumerate(downsamples)
        ]
        self.assemble(stem, stages, nn.Identity(), reductions=(4, 8, 16, 32))
        norm = partial(LayerNorm2d, eps=1e-5)
        self.head = NormMlpClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=norm
        )
        self.apply(initialise)
        initialise_mixers(self)

    @torch.jit.ignore
    def convert(self, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weights under our names, from a checkpoint with our names or with those of the release."""
        return checkpoint_filter_fn(checkpoint, self)


# Names of the release -> ours, tried in order
_RENAMED = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.token_mixer\.x_proj\.", ".mixer.value_proj."),
    (r"\.token_mixer\.proj\.", ".mixer.out_proj."),
    (r"\.token_mixer\.difference_control$", ".mixer.inhibition"),
    (r"\.token_mixer\.", ".mixer."),
    (r"\.channel_mixer\.norm_layer\.", ".mlp.norm."),
    (r"\.channel_mixer\.", ".mlp."),
    (r"\.layer_scale_(\d)\.", r".scale\1."),
    (r"\.norm_(\d)\.", r".norm\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights of the authors' release under our names; ours are returned as they are.

    Args:
        state_dict: weights by name, or a checkpoint that `weights_in` takes.
        model: the AttNet they are for.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    renamed = {}
    for name, tensor in weights_in(state_dict).items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if tensor.ndim == 4 and len(shapes.get(name, ())) == 2:  # a 1×1 convolution is a Linear here
            tensor = tensor.flatten(1)
        renamed[name] = tensor
    return renamed


_CFG = image_cfg("stem.0.0", paper_ids="arXiv:2510.20092")
default_cfgs = generate_default_cfgs(
    {f"attnet_{size}.untrained": _CFG for size in ("xxs", "xs", "s", "t1", "t2", "t3", "t4")}
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], options: dict[str, Any]) -> AttNet:
    return build(AttNet, variant, pretrained, defaults, options)


@register_model
def attnet_xxs(pretrained: bool = False, **options: Any) -> AttNet:
    """2,853,556 parameters; no layer scale, no norm in the channel mixers."""
    defaults = {"depths": (2, 2, 4, 2), "dims": (32, 64, 128, 240), "glu_norm": None, "layer_scale": None}
    return _create("attnet_xxs", pretrained, defaults, options)


@register_model
def attnet_xs(pretrained: bool = False, **options: Any) -> AttNet:
    """5,554,902 parameters; no norm in the channel mixers."""
    defaults = {"depths": (2, 2, 7, 2), "dims": (40, 80, 160, 320), "glu_norm": None}
    return _create("attnet_xs", pretrained, defaults, options)


@register_model
def attnet_s(pretrained: bool = False, **options: Any) -> AttNet:
    """7,681,316 parameters; no layer scale, no norm in the channel mixers."""
    defaults = {"depths": (2, 3, 10, 3), "dims": (40, 80, 160, 320), "glu_norm": None, "layer_scale": None}
    return _create("attnet_s", pretrained, defaults, options)


@register_model
def attnet_t1(pretrained: bool = False, **options: Any) -> AttNet:
    """13,714,900 parameters; 82.8 % top-1 on ImageNet in the paper."""
    return _create("attnet_t1", pretrained, {"depths": (2, 3, 12, 3), "dims": (48, 96, 224, 384)}, options)


@register_model
def attnet_t2(pretrained: bool = False, **options: Any) -> AttNet:
    """27,010,782 parameters; 84.4 % top-1 on ImageNet in the paper."""
    return _create("attnet_t2", pretrained, {"depths": (3, 3, 16, 3), "dims": (64, 128, 288, 512)}, options)


@register_model
def attnet_t3(pretrained: bool = False, **options: Any) -> AttNet:
    """49,175,682 parameters; 85.3 % top-1 on ImageNet in the paper."""
    return _create("attnet_t3", pretrained, {"depths": (4, 4, 26, 4), "dims": (72, 144, 320, 576)}, options)


@register_model
def attnet_t4(pretrained: bool = False, **options: Any) -> AttNet:
    """87,320,214 parameters; 85.6 % top-1 on ImageNet in the paper."""
    return _create("attnet_t4", pretrained, {"depths": (5, 5, 28, 5), "dims": (96, 192, 384, 768)}, options)
