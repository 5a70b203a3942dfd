"""Keyed randomness: every random number is a function of (seed, stream, index) and nothing else.

It does not depend on the batch size, the number of processes, the device or earlier draws. Numbers are drawn on the CPU
from counter-based Philox generators (Salmon et al. 2011), one per key. torch's CPU generator keeps only 32 bits of its
seed, so that two of 50,000 keyed samples would coincide with probability ¼.
"""

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch

MAX_SEED = 2**64 - 1  # of a run or of samples; torch's limit


class Stream(IntEnum):
    """The purpose of a random number. Streams with the same seed and index are independent of one another."""

    ORDER = 0  # the permutation of an epoch
    FLIP = 1  # whether a training image is mirrored
    POSTERIOR = 2  # the autoencoder's posterior sample
    TIME = 3  # flow-matching time
    NOISE = 4  # flow-matching noise, and the starting noise of a sample
    LABEL_DROPOUT = 5
    LABEL = 6  # random labels of samples
    INCREMENT = 7  # Brownian increments of the SDE solvers
    BOOTSTRAP = 8
    PROBE = 9  # random signs that estimate a divergence
    DEQUANTISATION = 10
    HELD_OUT = 11  # which rows of a data set are held out
    HELD_OUT_POSTERIOR = 12  # the posterior samples and the noise of the held-out loss
    HELD_OUT_NOISE = 13
    DIRECTION = 14  # on which features are projected
    SUBSET = 15  # which features of the larger side are compared
    MEAN_FLOW_TIMES = 16  # the two times of an average velocity
    MEAN_FLOW_NOISE = 17
    AUGMENTATION = 18  # of a picture for an image network
    MIXING = 19  # mixup and cutmix of a micro-batch
    DROPPED_PATHS = 20


def keyed_generator(seed: int, stream: Stream, *index: int) -> np.random.Generator:
    """A generator whose output depends only on its key. All parts of the key are integers >= 0."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, int(stream), *map(int, index)])))


def keyed_normal(seed: int, stream: Stream, indices: Iterable[int], shape: tuple[int, ...], *key: int) -> torch.Tensor:
    """Standard normal noise, one sample per index: float32 of shape (len(indices), *shape), on the CPU.

    `key` holds further integers, such as the number of a solver step.
    """
    rows = [keyed_generator(seed, stream, i, *key).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)


def keyed_uniform(seed: int, stream: Stream, indices: Iterable[int]) -> torch.Tensor:
    """Uniform numbers in [0, 1), one per index: float64 of shape (len(indices),), on the CPU."""
    return torch.tensor([keyed_generator(seed, stream, i).random() for i in indices], dtype=torch.float64)
