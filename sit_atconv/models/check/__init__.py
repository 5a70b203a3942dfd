"""A token mixer put through its paces: `python -m sit_atconv.models.check NAME | MODULE:CLASS`."""
