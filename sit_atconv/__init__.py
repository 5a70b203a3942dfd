"""sit-atconv: diffusion transformers that mix tokens by attention, by Attentive Convolution, or by both in turn."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from sit_atconv.runtime.terminal import begin_command

if TYPE_CHECKING:
    from sit_atconv.models import SiT, create_model, list_models
    from sit_atconv.sampling.pipeline import SiTPipeline

__version__ = "0.1.0"

__all__ = ["SiT", "SiTPipeline", "create_model", "list_models"]

_ROOMS = {
    "SiT": "sit_atconv.models",
    "SiTPipeline": "sit_atconv.sampling.pipeline",
    "create_model": "sit_atconv.models",
    "list_models": "sit_atconv.models",
}

# While Python looks for the module of `python -m sit_atconv.…`, and imports the packages above it.
if sys.argv[:1] == ["-m"] and any(word.startswith("sit_atconv.") for word in sys.orig_argv):
    begin_command()


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, in which commands notice wrong flags and Ctrl-C already."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'sit_atconv' has no attribute '{name}'")
    return getattr(importlib.import_module(_ROOMS[name]), name)
