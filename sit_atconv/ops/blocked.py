"""The portable backend: shifted multiply-adds in place, over blocks small enough to stay in a core's cache.

Tokens stay channels last, so nothing is transposed. Unfused sums over a whole batch would move x through memory K²
times; over a block of a megabyte they move it through the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sit_atconv.ops.precision import accumulation_dtype
from sit_atconv.ops.registration import register_operator

BLOCK_NUMBERS = 1 << 18  # with its result, a block of fp32 takes two MiB of a core's cache


def _blocks(B: int, H: int, W: int, C: int) -> Iterator[tuple[slice, range]]:
    """Samples and rows to work on at a time: several samples where they are small, bands of rows where large."""
    samples = max(1, min(B, BLOCK_NUMBERS // max(1, H * W * C)))
    rows = H if samples > 1 else max(1, min(H, BLOCK_NUMBERS // max(1, W * C)))
    for sample in range(0, B, samples):
        for row in range(0, H, rows):
            yield slice(sample, sample + samples), range(row, min(row + rows, H))


def _windows(rows: range, H: int, W: int, K: int) -> Iterator[tuple[int, int, tuple, tuple]]:
    """(u, v, target, source) for each tap: where it writes within the block of rows, and what it reads of the image."""
    p = K // 2
    for u in range(K):
        for v in range(K):
            top, bottom = max(rows.start, p - u), min(rows.stop, H + p - u)
            left, right = max(0, p - v), min(W, W + p - v)
            if top < bottom and left < right:
                target = (slice(None), slice(top - rows.start, bottom - rows.start), slice(left, right))
                yield (
                    u,
                    v,
                    target,
                    (slice(None), slice(top + u - p, bottom + u - p), slice(left + v - p, right + v - p)),
                )


def _taps(kernels: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, K, K) -> (K, K, B, 1, 1, C), each tap's channels contiguous."""
    return kernels.to(dtype).permute(2, 3, 0, 1).contiguous()[:, :, :, None, None]


def _forward(x: Tensor, kernels: Tensor) -> Tensor:
    B, H, W, C = x.shape
    K, dtype = kernels.shape[-1], accumulation_dtype(x.dtype)
    taps, y = _taps(kernels, dtype), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for samples, rows in _blocks(B, H, W, C):
        image = x[samples].to(dtype)
        total = image.new_zeros(len(image), len(rows), W, C)
        for u, v, target, source in _windows(rows, H, W, K):
            total[target].addcmul_(image[source], taps[u, v, samples])
        y[samples, rows.start : rows.stop] = total
    return y


def _backward(dy: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    B, H, W, C = x.shape
    K, dtype = kernels.shape[-1], accumulation_dtype(x.dtype)
    taps, dtaps = _taps(kernels, dtype), torch.zeros(K, K, B, C, dtype=dtype, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for samples, rows in _blocks(B, H, W, C):
        image, gradient = x[samples, rows.start : rows.stop].to(dtype), dy[samples].to(dtype)
        total = torch.zeros_like(image)
        # Seen from x, the tap (u, v) lies the other way: x[i] went into y[i - (u - p)].
        for u, v, target, source in _windows(rows, H, W, K):
            tap = K - 1 - u, K - 1 - v
            total[target].addcmul_(gradient[source], taps[(*tap, samples)])
            dtaps[(*tap, samples)] += (image[target] * gradient[source]).flatten(1, 2).sum(1)
        dx[samples, rows.start : rows.stop] = total
    return dx, dtaps.permute(2, 3, 0, 1).to(kernels.dtype).contiguous()


blocked_sums = register_operator("depthwise_blocked", _forward, _backward)
