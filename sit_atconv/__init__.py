"""sit-atconv: diffusion transformers that mix tokens by attention, by Attentive Convolution, or by both in turn."""

from sit_atconv.models import SiT, create_model, list_models
from sit_atconv.sampling.pipeline import SiTPipeline

__version__ = "0.1.0"

__all__ = ["SiT", "SiTPipeline", "create_model", "list_models"]
