"""Sources of pictures in a fixed order: folders, zips, npz files, prepared data, Hugging Face data sets."""

from sit_atconv.data.sources.open import open_source, require_undamaged

__all__ = ["open_source", "require_undamaged"]
