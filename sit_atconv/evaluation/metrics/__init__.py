"""The metrics, as functions of features."""
