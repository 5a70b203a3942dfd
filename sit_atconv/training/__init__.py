"""Training: the loop, and what makes it safe to interrupt."""

from sit_atconv.training.trainer import train

__all__ = ["train"]
