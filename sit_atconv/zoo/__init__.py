"""Image networks: importing this package registers them with timm, as in ``timm.create_model("attnet_t1")``."""

from sit_atconv.zoo.atconv_pvt import ATConvPVT
from sit_atconv.zoo.attnet import AttNet
from sit_atconv.zoo.pvt import PVT
from sit_atconv.zoo.resnet import ACmixResNet
from sit_atconv.zoo.san import SAN
from sit_atconv.zoo.swin import SwinPyramid

__all__ = ["PVT", "SAN", "ACmixResNet", "ATConvPVT", "AttNet", "SwinPyramid"]
