"""Sampler settings for the grids and scores of training."""

from sit_atconv.config import EvaluationConfig, PreviewConfig
from sit_atconv.sampling import SamplerSettings


def sampler_settings(config: PreviewConfig | EvaluationConfig) -> SamplerSettings:
    """The settings of a configuration, without its interval if there is no guidance, as `SamplerSettings` refuses one.

    Raises `InputError` for settings that cannot be used.
    """
    interval = tuple(config.interval) if config.guidance != 1 else (0.0, 1.0)
    internal = {"internal_guidance": config.internal_guidance, "internal_interval": tuple(config.internal_interval)}
    return SamplerSettings(config.solver, config.steps, config.guidance, interval, **internal)
