"""Mixers that are convolutions with learnt kernels, the same for all images."""
