"""How an operator routes information over a map, and what its output looks like (arXiv 2510.20092, Fig. 1 and 3).

The paper defines influence maps, contrast and rank; FAR, arrows and suppression are drawn there without a formula, and
are the simplest definitions here for which its captions hold (docs/analysis.md).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sit_atconv.errors import InputError

Operator = Callable[[Tensor], Tensor]  # maps (1, C, H, W) -> (1, C', H, W)
_BLUR_SIGMA, _BLUR_REACH = 1.0, 2  # positions
_STRONGEST = 0.1  # share of positions that an arrow averages


def influence(operator: Operator, x: Tensor, anchor: tuple[int, int], channel: int) -> Tensor:
    """G(p) = Σ_c |∂y[channel, anchor] / ∂x[c, p]| of y = operator(x), for x (1, C, H, W): (H, W)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(operator(x)[0, channel, anchor[0], anchor[1]], x)
    return gradient[0].abs().sum(0)


def far(influences: Tensor, anchor: tuple[int, int], radius: float) -> float:
    """The share of an influence map (H, W) that is further than `radius` positions from the anchor; in [0, 1]."""
    beyond = distances(influences, anchor) > radius
    return (influences[beyond].sum() / influences.sum()).item()


def arrow(influences: Tensor, anchor: tuple[int, int]) -> tuple[float, float]:
    """Row and column of the centroid of the strongest tenth of an influence map (H, W), weighted by distance.

    The anchor itself is left out; it is returned where nothing else has an influence.
    """
    away = distances(influences, anchor)
    others = influences.where(away > 0, 0)
    count = max(1, round(_STRONGEST * others.numel()))
    threshold = others.flatten().topk(count).values[-1]
    weights = (others * away).where(others >= threshold, 0)
    if not weights.sum() > 0:
        return float(anchor[0]), float(anchor[1])
    rows, columns = (torch.arange(length, dtype=weights.dtype, device=weights.device) for length in weights.shape)
    total = weights.sum()
    return ((weights.sum(1) @ rows) / total).item(), ((weights.sum(0) @ columns) / total).item()


def suppression(operator: Operator, x: Tensor, anchor: tuple[int, int], channel: int, epsilon: float = 1.0) -> Tensor:
    """How much influence the other positions of x (1, C, H, W) lose when all channels at the anchor grow by `epsilon`.

    S(p) = max(0, G(p; x) − G(p; x + ε at the anchor)) / ΣG(·; x) for p ≠ anchor, 0 at the anchor: (H, W). It is 0 for
    every operator that is linear in x, such as a convolution with static kernels.
    """
    raised = x.clone()
    raised[:, :, anchor[0], anchor[1]] += epsilon
    before, after = (influence(operator, each, anchor, channel) for each in (x, raised))
    lost = (before - after).clamp(min=0)
    lost[anchor] = 0
    return lost / before.sum()


def centre_surround_contrast(maps: Tensor) -> float:
    """CSC = E|x − blur(x)| / E|x| of maps (B, C, H, W), over samples, channels and positions (Eq. of Fig. 3).

    The blur is a Gaussian of σ = 1 on 5×5 positions, reflected at the border; the paper does not give them. 0 for
    constant maps, about 0.87 for white noise; scaling the maps changes nothing.

    Raises `InputError` for maps of fewer than 3 rows or columns, which cannot be reflected.
    """
    if min(maps.shape[-2:]) <= _BLUR_REACH:
        raise InputError(f"Contrast needs maps of 3×3 positions or more, not {maps.shape[-2]}×{maps.shape[-1]}.")
    maps = maps.double()
    offsets = torch.arange(-_BLUR_REACH, _BLUR_REACH + 1, dtype=maps.dtype, device=maps.device)
    weights = torch.exp(-(offsets**2) / (2 * _BLUR_SIGMA**2))
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    padded = F.pad(maps, (_BLUR_REACH,) * 4, mode="reflect").flatten(0, 1).unsqueeze(1)
    blurred = F.conv2d(padded, kernel[None, None]).squeeze(1).unflatten(0, maps.shape[:2])
    return ((maps - blurred).abs().mean() / maps.abs().mean()).item()


def channel_effective_rank(maps: Tensor) -> float:
    """CER = exp(H(p)) / C of maps (B, C, H, W), p the normalised eigenvalues of the channels' covariance, in (0, 1].

    H = −Σ p log p; the covariance is over samples and positions (Eq. of Fig. 3). 1/C for maps of rank one. NaN for maps
    that are constant.
    """
    rows = maps.double().movedim(1, -1).flatten(0, -2)
    eigenvalues = torch.linalg.eigvalsh(torch.atleast_2d(torch.cov(rows.T, correction=0))).clamp(min=0)
    p = eigenvalues / eigenvalues.sum()
    return (torch.special.entr(p).sum().exp() / maps.shape[1]).item()


def distances(like: Tensor, anchor: tuple[int, int]) -> Tensor:
    """The distance in positions of every position of a map (H, W) from the anchor: (H, W), in its dtype."""
    rows, columns = (
        torch.arange(length, dtype=like.dtype, device=like.device) - place
        for length, place in zip(like.shape, anchor, strict=True)
    )
    return (rows[:, None] ** 2 + columns**2).sqrt()


def middle(height: int, width: int) -> tuple[int, int]:
    """The position in the middle of a map."""
    return math.floor(height / 2), math.floor(width / 2)
