"""sit-atconv: diffusion transformers that mix tokens by attention, by Attentive Convolution, or by both in turn."""

from typing import TYPE_CHECKING

from sit_atconv.models import SiT, create_model, list_models

if TYPE_CHECKING:
    from sit_atconv.sampling.pipeline import SiTPipeline

__version__ = "0.1.0"

__all__ = ["SiT", "SiTPipeline", "create_model", "list_models"]


def __getattr__(name: str) -> type:
    """Import the pipeline when it is asked for: diffusers' part of it takes a second that no other program needs."""
    if name != "SiTPipeline":
        raise AttributeError(f"module 'sit_atconv' has no attribute '{name}'")
    from sit_atconv.sampling.pipeline import SiTPipeline

    return SiTPipeline
