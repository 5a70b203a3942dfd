"""Accuracy of image networks: pictures with classes, networks with their weights, top-1 and top-5."""
