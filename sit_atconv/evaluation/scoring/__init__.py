"""Computes metrics from features, their confidence intervals, and distances per class."""
