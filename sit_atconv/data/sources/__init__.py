"""Pictures in a fixed order, whatever they are kept in."""

from sit_atconv.data.sources.open import open_source, require_undamaged

__all__ = ["open_source", "require_undamaged"]
