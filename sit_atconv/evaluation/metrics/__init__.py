"""The numbers themselves, as functions of features."""
