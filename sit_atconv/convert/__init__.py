"""Converts released checkpoints of SiT, REPA and ATConv to our models."""

from sit_atconv.convert.released import load_released

__all__ = ["load_released"]
