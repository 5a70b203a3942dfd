"""Generation: batches as an iterable, and what is done with them."""

from sit_atconv.sampling.generate import SampleBatch, generate
from sit_atconv.sampling.run import open_generator, sample_to_directory
from sit_atconv.sampling.settings import SOLVERS, SamplerSettings

__all__ = ["SOLVERS", "SampleBatch", "SamplerSettings", "generate", "open_generator", "sample_to_directory"]
