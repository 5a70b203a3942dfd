"""Alignment with pretrained vision encoders (REPA, arXiv 2410.06940): teachers and projectors."""

from sit_atconv.alignment.projector import Projector
from sit_atconv.alignment.teacher import Teacher

__all__ = ["Projector", "Teacher"]
