"""Training: the loop, and everything that makes it safe to interrupt."""

from sit_atconv.training.trainer import train

__all__ = ["train"]
