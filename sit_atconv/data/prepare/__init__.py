"""From pictures to shards of latents: `python -m sit_atconv.data.prepare`."""
