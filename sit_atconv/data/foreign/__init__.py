"""Latents that other projects prepared, a file for each layout; `prepare.importing` converts them to shards."""
