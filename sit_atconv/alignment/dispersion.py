"""The dispersive loss, which drives apart the hidden tokens of different samples (DispLoss, arXiv 2506.09027)."""

import math

import torch
from torch import Tensor

from sit_atconv.errors import InputError


def dispersive_loss(tokens: Tensor, group: int, tau: float) -> Tensor:
    """The mean over groups of log mean exp(−|hᵢ − hⱼ|² / (D·τ)), a scalar in fp32.

    h = tokens (B, N, C) flattened to D = N·C. The mean is over all pairs (i, j) of a group, the diagonal included
    (Eq. 6 with squared L2 distances, as its release computes it). The paper compares the samples of a device with one
    another; groups of fixed size, successive samples each, make the loss independent of how many devices there are.

    Raises `InputError` unless `group` divides B.
    """
    if len(tokens) % group:
        raise InputError(f"{len(tokens)} samples do not divide into groups of {group}.")
    with torch.autocast(tokens.device.type, enabled=False):
        h = tokens.float().reshape(-1, group, tokens[0].numel())
        h = h - h.mean(1, keepdim=True)  # leaves distances as they are, and their digits in fp32
        products = h @ h.mT
        squares = products.diagonal(dim1=1, dim2=2)
        distances = squares.unsqueeze(1) + squares.unsqueeze(2) - 2 * products
        exponents = -distances / (h.shape[-1] * tau)
        return (exponents.logsumexp((1, 2)) - math.log(group**2)).mean()
