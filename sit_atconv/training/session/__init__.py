"""Everything a run works with, from its configuration to the first step."""
