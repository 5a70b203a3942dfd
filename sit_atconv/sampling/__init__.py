"""Sampling: an iterable of finished batches, and the commands and writers that consume it."""

from sit_atconv.sampling.generate import SampleBatch, generate
from sit_atconv.sampling.run import open_generator, sample_to_directory
from sit_atconv.sampling.settings import SOLVERS, SamplerSettings

__all__ = ["SOLVERS", "SampleBatch", "SamplerSettings", "generate", "open_generator", "sample_to_directory"]
