"""The settings of one objective: a section within `flow`."""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from sit_atconv.config.ranges import ClosedUnitInterval, Few


@dataclass(frozen=True)
class MeanFlowConfig:
    """Decoupled MeanFlow (arXiv 2510.24474), where flow.objective is meanflow: docs/techniques.md.

    Args:
        blocks: so many first blocks see the time t, the others and the final layer the time r; null for 20 of 28.
        guidance: scale of the guidance that the network learns to contain; 1 is none, as in unconditional models.
        interval: times t within which guidance acts.
    """

    blocks: Few | None = None
    guidance: Annotated[float, Meta(ge=1, le=1e6)] = 2.5
    interval: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.0, 0.7)
