"""A run on disk: its directory, checkpoints and log, and the ways in which it ends."""
