"""Mixers in which a token attends to a part of the map: to its window, or to every r-th row and column."""
