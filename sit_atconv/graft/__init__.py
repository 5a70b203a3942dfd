"""Grafting: new mixers in a trained network (Chandrasegaran et al. 2025, arXiv 2506.05340); see docs/techniques.md."""
