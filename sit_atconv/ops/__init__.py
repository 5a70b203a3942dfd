"""Hot functions, pure and with backends."""

from sit_atconv.ops.depthwise import BACKENDS, per_sample_depthwise_conv2d

__all__ = ["BACKENDS", "per_sample_depthwise_conv2d"]
