"""PVT (Wang et al. 2021, arXiv 2102.12122), also with ACmix's convolution path beside attention (arXiv 2111.14556)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, register_notrace_function, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sit_atconv.zoo.atconv_pvt import DEPTHS, DIMS, HEADS, PATCHES, RATIOS
from sit_atconv.zoo.layers import PatchEmbed, drop_path_rates, initialise_linear
from sit_atconv.zoo.pyramid import Pyramid
from sit_atconv.zoo.reduced import ReducedACmix, ReducedAttention
from sit_atconv.zoo.registration import build, image_cfg, weights_in

_REDUCTIONS = (8, 4, 2, 1)
_STRIDES = (4, 8, 16, 32)


@register_notrace_function
def add_position(x: Tensor, table: Tensor, side_h: int, side_w: int) -> Tensor:
    """Add position vectors (1, h·w, C), interpolated to the map's size, to a map (B, C, H, W)."""
    image = table.transpose(1, 2).reshape(1, x.shape[1], side_h, side_w)
    if x.shape[2] != side_h or x.shape[3] != side_w:
        image = F.interpolate(image, (x.shape[2], x.shape[3]), mode="bilinear")
    return x + image


class TokenBlock(nn.Module):
    """A pre-norm block of PVT on tokens (B, N, C): attention, then an MLP."""

    def __init__(self, dim: int, attention: nn.Module, ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), attention
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, ratio * dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), (height, width)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TokenStage(nn.Module):
    """Patch embedding, position vectors, and blocks on tokens: (B, C_in, H, W) -> (B, C, H', W').

    Args:
        embed: map -> map of width C.
        blocks: the blocks.
        dim: C.
        side: height and width of the stored table of position vectors.
        class_token: whether a class token is the first of the tokens.
    """

    def __init__(
        self, embed: nn.Module, blocks: Sequence[nn.Module], dim: int, side: tuple[int, int], class_token: bool
    ) -> None:
        super().__init__()
        self.patch_embed, self.side_h, self.side_w = embed, side[0], side[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, side[0] * side[1] + class_token, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[0]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map (B, C, H', W') and, before it, the tokens (B, N, C) that are not on it: N is 1 or 0."""
        extra = 0 if self.cls_token is None else 1
        x = add_position(self.patch_embed(x), self.pos_embed[:, extra:], self.side_h, self.side_w)
        batch, dim, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            first = self.cls_token + self.pos_embed[:, :1]
            tokens = torch.cat([first.expand(batch, -1, -1), tokens], 1)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                tokens = checkpoint(block, tokens, height, width, use_reentrant=False)
            else:
                tokens = block(tokens, height, width)
        image = tokens[:, extra:].transpose(1, 2).reshape(batch, dim, height, width)
        return image, tokens[:, :extra]


class PVT(Pyramid):
    """Images (B, in_chans, H, W), H, W >= 32 -> logits (B, num_classes), read from a class token.

    Any such size works: position vectors are interpolated from those of `img_size`. The weights of PVT's release load.

    Args:
        depths: blocks of each stage.
        acmix: ACmix's convolution path beside attention.
        img_size: the size that the position vectors are stored for.
        num_classes, in_chans, drop_rate, drop_path_rate: as in timm.
        global_pool: "token" (the class token), "avg" (the mean of the last map), or "" (the map).

    Raises:
        InputError: for smaller images.
    """

    def __init__(
        self,
        depths: Sequence[int] = DEPTHS["tiny"],
        acmix: bool = False,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.dims, self.num_classes, self.in_chans, self.global_pool = DIMS, num_classes, in_chans, global_pool
        rates = drop_path_rates(drop_path_rate, depths)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size

        def attention(*sizes: int) -> nn.Module:
            return ReducedACmix(*sizes) if acmix else ReducedAttention(*sizes)

        def stage(number: int) -> TokenStage:
            dim, heads, last = DIMS[number], HEADS[number], number == len(DIMS) - 1
            blocks = [
                TokenBlock(dim, attention(dim, heads, _REDUCTIONS[number]), RATIOS[number], p) for p in rates[number]
            ]
            before, smallest = (DIMS[number - 1], 1) if number else (in_chans, 32)
            embed = PatchEmbed(before, dim, PATCHES[number], smallest=smallest)
            side = height // _STRIDES[number], width // _STRIDES[number]
            return TokenStage(embed, blocks, dim, side, class_token=last)

        self.assemble(nn.Identity(), [stage(number) for number in range(len(DIMS))], nn.Identity(), _STRIDES)
        self.norm = nn.LayerNorm(DIMS[-1], eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(DIMS[-1], num_classes) if num_classes else nn.Identity()
        self.apply(initialise_linear)
        for name, parameter in self.named_parameters():
            if name.endswith(("pos_embed", "cls_token")):
                trunc_normal_(parameter, std=0.02)

    @torch.jit.ignore
    def convert(self, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weights under our names, from a checkpoint with our names or with those of PVT's release."""
        return checkpoint_filter_fn(checkpoint, self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves out."""
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for `num_classes` (0: none); `global_pool` "" leaves the maps as they are."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        weight = self.stages[0].patch_embed.proj.weight
        self.head = nn.Linear(self.num_features, num_classes).to(weight) if num_classes else nn.Identity()
        self.head.train(self.training)

    def remove_head(self) -> None:
        """Leave the last map."""
        self.reset_classifier(0, "")

    def normalise(self, x: Tensor) -> Tensor:
        """The final norm of a map (B, C, H, W)."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map, normalised: (B, C, H/32, W/32)."""
        return self.normalise(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of a map (B, C, H, W), or with `pre_logits` what the last layer sees.

        A map has no class token, so that its mean is taken; only calling the network reads the token.
        """
        if self.global_pool != "":
            x = x.mean((2, 3))
        return self._classify(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        token = x
        for stage in self.stages:
            x, token = stage.both(x)
        if self.global_pool == "token":
            return self._classify(self.norm(token[:, 0]), False)
        return self.forward_head(self.normalise(x))

    def _classify(self, x: Tensor, pre_logits: bool) -> Tensor:
        x = self.drop(x)
        if pre_logits:
            return x
        if self.global_pool == "":
            return self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x)


# Names of PVT's release -> ours
_RENAMED = [
    (r"^(patch_embed|pos_embed)(\d)", lambda m: f"stages.{int(m[2]) - 1}.{m[1]}"),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^cls_token$", "stages.3.cls_token"),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights of PVT's release under our names; ours are returned as they are.

    Args:
        state_dict: weights by name, or a checkpoint that `weights_in` takes.
        model: the PVT they are for.
    """
    renamed = {}
    for name, tensor in weights_in(state_dict).items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


_CFG = image_cfg("stages.0.patch_embed.proj", "head", crop_pct=0.9)
default_cfgs = generate_default_cfgs(
    {f"pvt_{size}.untrained": {**_CFG, "paper_ids": "arXiv:2102.12122"} for size in DEPTHS}
    | {f"acmix_pvt_{size}.untrained": {**_CFG, "paper_ids": "arXiv:2111.14556"} for size in ("tiny", "small")}
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], options: dict[str, Any]) -> PVT:
    return build(PVT, variant, pretrained, defaults, options)


@register_model
def pvt_tiny(pretrained: bool = False, **options: Any) -> PVT:
    """13,229,288 parameters."""
    return _create("pvt_tiny", pretrained, {"depths": DEPTHS["tiny"]}, options)


@register_model
def pvt_small(pretrained: bool = False, **options: Any) -> PVT:
    """24,485,864 parameters."""
    return _create("pvt_small", pretrained, {"depths": DEPTHS["small"]}, options)


@register_model
def pvt_medium(pretrained: bool = False, **options: Any) -> PVT:
    """44,208,104 parameters."""
    return _create("pvt_medium", pretrained, {"depths": DEPTHS["medium"]}, options)


@register_model
def pvt_large(pretrained: bool = False, **options: Any) -> PVT:
    """61,369,320 parameters."""
    return _create("pvt_large", pretrained, {"depths": DEPTHS["large"]}, options)


@register_model
def acmix_pvt_tiny(pretrained: bool = False, **options: Any) -> PVT:
    """13,396,056 parameters."""
    return _create("acmix_pvt_tiny", pretrained, {"depths": DEPTHS["tiny"], "acmix": True}, options)


@register_model
def acmix_pvt_small(pretrained: bool = False, **options: Any) -> PVT:
    """24,824,611 parameters."""
    return _create("acmix_pvt_small", pretrained, {"depths": DEPTHS["small"], "acmix": True}, options)
