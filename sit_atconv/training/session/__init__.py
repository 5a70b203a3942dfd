"""Everything that a run needs before its first step, built from the configuration."""
