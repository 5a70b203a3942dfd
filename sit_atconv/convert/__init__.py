"""Released checkpoints of SiT, REPA and ATConv as models of ours."""

from sit_atconv.convert.released import load_released

__all__ = ["load_released"]
