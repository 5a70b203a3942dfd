"""What token mixers do to a map: routing, inhibition, contrast, rank (arXiv 2510.20092, Fig. 1 and 3)."""

from sit_atconv.analysis.measures import centre_surround_contrast, channel_effective_rank, far, influence, suppression

__all__ = ["centre_surround_contrast", "channel_effective_rank", "far", "influence", "suppression"]
