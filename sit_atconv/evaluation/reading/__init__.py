"""Reads pictures and files of statistics, and collects what the metrics compare."""
