"""A run on disk: its directory, checkpoints, log, and the ways in which it ends."""
