"""Averages of the weights over training, whole or split among processes."""
