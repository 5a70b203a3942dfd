"""Checks of a token mixer: `python -m sit_atconv.models.check NAME | MODULE:CLASS`."""
