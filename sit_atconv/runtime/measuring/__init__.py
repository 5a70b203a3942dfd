"""Measures time and memory of calls, and writes down what ran on which machine."""
