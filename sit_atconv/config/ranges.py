"""Ranges of numbers in a configuration, and keys that files name only where they are set."""

from dataclasses import field
from typing import Annotated, Any, Literal

from msgspec import Meta

# Upper limits are far above any real training run: a typing error is refused before memory is allocated.
Steps = Annotated[int, Meta(ge=1, le=10**12)]
Number = Annotated[int, Meta(ge=1, le=10_000_000)]
Width = Annotated[int, Meta(ge=1, le=16_384)]
Few = Annotated[int, Meta(ge=1, le=1_000)]
Classes = Annotated[int, Meta(ge=0, le=1_000_000)]
Ratio = Annotated[float, Meta(gt=0, le=64)]
PositiveFloat = Annotated[float, Meta(gt=0, le=1e6)]
NonNegativeFloat = Annotated[float, Meta(ge=0, le=1e6)]
ClosedUnitInterval = Annotated[float, Meta(ge=0, le=1)]
OpenUnitInterval = Annotated[float, Meta(gt=0, lt=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]
Seconds = Annotated[float, Meta(gt=0, le=1e9)]
Solver = Literal["euler", "heun", "midpoint", "adams2", "adams4", "dopri5", "sde", "sde-heun", "meanflow"]


def if_set(default: Any) -> Any:
    """A key that joined later: written files name it only where it is set, and so stay those of earlier versions."""
    return field(default=default, metadata={"if_set": True})
