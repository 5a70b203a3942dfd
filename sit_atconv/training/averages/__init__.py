"""Averages of the weights over training, sharded or not."""
