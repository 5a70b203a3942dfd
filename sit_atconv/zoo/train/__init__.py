"""Training of image networks: `python -m sit_atconv.zoo.train`, with the loop, run directory and resume of a SiT's."""
