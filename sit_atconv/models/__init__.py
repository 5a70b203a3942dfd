"""The models and their registry."""

from sit_atconv.models.registry import create_model, list_models
from sit_atconv.models.sit import SiT

__all__ = ["SiT", "create_model", "list_models"]
