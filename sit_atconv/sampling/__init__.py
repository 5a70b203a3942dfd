"""Generation: batches as an iterable, and what is done with them."""

from sit_atconv.sampling.generate import SOLVERS, SampleBatch, SamplerSettings, generate
from sit_atconv.sampling.run import open_generator, sample_to_directory

__all__ = ["SOLVERS", "SampleBatch", "SamplerSettings", "generate", "open_generator", "sample_to_directory"]
