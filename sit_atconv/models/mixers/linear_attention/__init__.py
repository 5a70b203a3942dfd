"""Mixers whose cost is linear in the tokens: they sum over keys and values first, and then ask with each query."""
