"""Alignment with pretrained vision encoders (REPA, arXiv 2410.06940): teachers, their cached tokens, and projectors."""

from sit_atconv.alignment.cached import CachedTeacher, TeacherSpec, find_tokens
from sit_atconv.alignment.dispersion import dispersive_loss
from sit_atconv.alignment.latents import LATENTS, LatentProjector, LatentTeacher, latent_loss
from sit_atconv.alignment.projector import ConvProjector, Projector
from sit_atconv.alignment.teacher import Teacher
from sit_atconv.alignment.tokens import normalise_spatially, resample_tokens

__all__ = [
    "LATENTS",
    "CachedTeacher",
    "ConvProjector",
    "LatentProjector",
    "LatentTeacher",
    "Projector",
    "Teacher",
    "TeacherSpec",
    "dispersive_loss",
    "find_tokens",
    "latent_loss",
    "normalise_spatially",
    "resample_tokens",
]
