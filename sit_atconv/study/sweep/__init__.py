"""A grid of sampler settings, scored on few samples: `python sample.py --sweep guidance=1,1.25,1.5 …`."""

from sit_atconv.study.sweep.command import main

__all__ = ["main"]
