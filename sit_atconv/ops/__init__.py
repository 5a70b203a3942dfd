"""The operations that take most of the time: pure functions, each with several backends."""

from sit_atconv.ops.correlation import depthwise_kernel_gradient
from sit_atconv.ops.depthwise import BACKENDS, per_sample_depthwise_conv2d
from sit_atconv.ops.pooling import pool_tokens

__all__ = ["BACKENDS", "depthwise_kernel_gradient", "per_sample_depthwise_conv2d", "pool_tokens"]
