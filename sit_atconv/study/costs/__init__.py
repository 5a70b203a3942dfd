"""What models and mixers cost: `python -m sit_atconv.study costs`."""

from sit_atconv.study.costs.command import main

__all__ = ["main"]
