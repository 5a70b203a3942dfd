"""Studies: grids of runs by our own programs, and what they compare."""
