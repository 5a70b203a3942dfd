"""ResNet with ACmix in place of the 3×3 convolutions (Pan et al. 2022, arXiv 2111.14556): depths of 26, 38 and 50."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from sit_atconv.models.mixers import ACmix
from sit_atconv.models.mixers.acmix.released import convert_acmix
from sit_atconv.zoo.mixing import create_image_mixer
from sit_atconv.zoo.pyramid import Pyramid
from sit_atconv.zoo.registration import build, image_cfg, weights_in

_EXPANSION, _HEADS, _NEIGHBOURHOOD = 4, 4, 7
_PLANES = (64, 128, 256, 512)


class Bottleneck(nn.Module):
    """1×1, ACmix, 1×1, each with BatchNorm, and a residual (ResNet v1.5): (B, C_in, H, W) -> (B, 4·planes, H', W').

    ACmix with stride 2 is every second row and column of ACmix: H' = ⌈H/2⌉.
    """

    def __init__(self, in_channels: int, planes: int, stride: int, shift_module: str) -> None:
        super().__init__()
        self.stride, out = stride, _EXPANSION * planes
        self.conv1, self.bn1 = nn.Conv2d(in_channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        acmix = {"name": "acmix", "neighbourhood": _NEIGHBOURHOOD}
        acmix |= {"shift_module": shift_module} if shift_module != "learned" else {}
        self.conv2, self.bn2 = create_image_mixer(acmix, planes, _HEADS), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = nn.Identity()
        if stride > 1 or in_channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        tokens = self.conv2(y.flatten(2).transpose(1, 2), (y.shape[2], y.shape[3]))
        y = tokens.transpose(1, 2).reshape(y.shape)[:, :, :: self.stride, :: self.stride]
        y = self.bn3(self.conv3(F.relu(self.bn2(y))))
        return F.relu(y + self.downsample(x))


class ResNetStage(nn.Module):
    """Bottlenecks, the first of which may have a stride."""

    def __init__(self, blocks: Sequence[Bottleneck]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class ACmixResNet(Pyramid):
    """Images (B, in_chans, H, W), any H, W >= 1 -> logits (B, num_classes).

    Unlike in the release, whose own initialisation of convolutions overwrites them, the kernels of ACmix's convolution
    path start as shifts; `shift_module="random"` is what the release trains.

    Args:
        depths: bottlenecks of each stage.
        shift_module: see `ACmix`.
        num_classes, in_chans, global_pool, drop_rate: as in timm.
    """

    def __init__(
        self,
        depths: Sequence[int] = (1, 2, 4, 1),
        shift_module: str = "learned",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.dims = tuple(_EXPANSION * planes for planes in _PLANES)
        stem = nn.Sequential(
            nn.Conv2d(in_chans, _PLANES[0], 7, 2, 3, bias=False),
            nn.BatchNorm2d(_PLANES[0]),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )

        def block(stage: int, number: int) -> Bottleneck:
            before = self.dims[stage - 1] if stage else _PLANES[0]
            first = number == 0
            stride = 2 if first and stage else 1
            return Bottleneck(before if first else self.dims[stage], _PLANES[stage], stride, shift_module)

        stages = [ResNetStage([block(stage, n) for n in range(depth)]) for stage, depth in enumerate(depths)]
        self.assemble(stem, stages, nn.Identity(), reductions=(4, 8, 16, 32))
        self.head = ClassifierHead(self.dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ACmix):
                module.initialise()

    @torch.jit.ignore
    def convert(self, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weights under our names, from a checkpoint with our names or with those of the release."""
        return checkpoint_filter_fn(checkpoint, self)


_OURS = ("attention.", "convolution.", "alpha", "beta", "mixer.")  # what ACmix's names begin with here
# Names of the release, but for those within ACmix -> ours
_RENAMED = [
    (r"^module\.", ""),
    (r"^conv1\.", "stem.0."),
    (r"^bn1\.", "stem.1."),
    (r"^layer(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"^fc\.", "head.fc."),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights of ACmix's released ResNets under our names; ours are returned as they are.

    Args:
        state_dict: weights by name, or a checkpoint that `weights_in` takes.
        model: the network they are for.
    """
    renamed: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights_in(state_dict).items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        block, within, part = name.partition(".conv2.")
        if within and not part.startswith(_OURS):
            modules.setdefault(f"{block}.conv2.", {})[part] = tensor
        else:
            renamed[name] = tensor
    for prefix, module in modules.items():
        renamed |= {prefix + name: tensor for name, tensor in convert_acmix(module).items()}
    return renamed


_CFG = image_cfg("stem.0", interpolation="bilinear", paper_ids="arXiv:2111.14556")
default_cfgs = generate_default_cfgs({f"acmix_resnet{depth}.untrained": _CFG for depth in (26, 38, 50)})


def _create(variant: str, pretrained: bool, depths: Sequence[int], options: dict[str, Any]) -> ACmixResNet:
    return build(ACmixResNet, variant, pretrained, {"depths": depths}, options)


@register_model
def acmix_resnet26(pretrained: bool = False, **options: Any) -> ACmixResNet:
    """10,487,816 parameters, as the release builds it; 76.1 % top-1 on ImageNet in the paper."""
    return _create("acmix_resnet26", pretrained, (1, 2, 4, 1), options)


@register_model
def acmix_resnet38(pretrained: bool = False, **options: Any) -> ACmixResNet:
    """14,410,896 parameters, as the release builds it; 77.4 % top-1 on ImageNet in the paper."""
    return _create("acmix_resnet38", pretrained, (2, 3, 5, 2), options)


@register_model
def acmix_resnet50(pretrained: bool = False, **options: Any) -> ACmixResNet:
    """18,333,976 parameters, as the release builds it; 77.8 % top-1 on ImageNet in the paper."""
    return _create("acmix_resnet50", pretrained, (3, 4, 6, 3), options)
