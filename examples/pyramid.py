"""A network of timm's as a feature pyramid."""

import argparse

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from examples.common import network


class FeaturePyramid(nn.Module):
    """Images to the maps of a feature pyramid network (arXiv 1612.03144), one for each of the stages `taken`."""

    def __init__(self, options: argparse.Namespace, taken: tuple[int, ...], extra: ExtraFPNBlock | None = None) -> None:
        super().__init__()
        self.body = network(options, features_only=True, out_indices=taken)
        self.out_channels = options.width  # torchvision's detectors ask for it
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), options.width, extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(number): each for number, each in enumerate(self.body(x))})
