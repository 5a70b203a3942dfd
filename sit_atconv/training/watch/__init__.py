"""Monitoring a run: speed, sample grids and scores."""
