# ruff: noqa: RUF005 (Triton does not unpack tuples)
"""Triton kernels of the per-sample depthwise convolution and of its gradients, for CUDA.

The operator is memory-bound, so both kernels read each input row once per strip and add it to every output row that it
contributes to. Loops over a strip are unrolled. Sums are fp32 (fp64 for fp64). There are no atomic additions, so the
same input gives the same bits. `sit_atconv.ops.fused` launches them and imports this module only where Triton runs.
"""

import triton
import triton.language as tl

# Four or eight sums per thread and tap: with eight the backward kernel spills a few registers, with more many.
_TILES = ((32, 2), (32, 4), (64, 4), (64, 8))  # channels, warps
FORWARD_CONFIGURATIONS = [triton.Config({"ROWS": r, "BLOCK_C": c}, num_warps=w) for r in (4, 8, 16) for c, w in _TILES]
BACKWARD_CONFIGURATIONS = [triton.Config({"ROWS": r, "BLOCK_C": c}, num_warps=w) for r in (4, 8) for c, w in _TILES]
SHAPE = ["H", "W", "C", "K", "BLOCK_W"]  # tuned once for each shape, whatever the batch size


def _that_fit(
    configurations: list[triton.Config], tensors: dict, *, H: int, C: int, **others: object
) -> list[triton.Config]:
    """The configurations without idle rows or channels: each one tried takes seconds to compile."""
    rows, channels = 2 * max(H, 4), 2 * max(C, 32)
    return [each for each in configurations if each.kwargs["ROWS"] < rows and each.kwargs["BLOCK_C"] < channels]


FITTING = {"early_config_prune": _that_fit}


@triton.jit
def _load_row(x, row, columns, channels, H, W, C, dtype: tl.constexpr):
    """The tokens (BLOCK_W, BLOCK_C) of one row of an image x (H, W, C); zeros outside."""
    inside = (row >= 0) & (row < H) & (columns >= 0) & (columns < W)
    mask = inside[:, None] & (channels < C)[None, :]
    return tl.load(x + (row * W + columns)[:, None] * C + channels[None, :], mask=mask, other=0).to(dtype)


@triton.jit
def _store_row(y, values, row, columns, channels, H, W, C):
    """Write tokens (BLOCK_W, BLOCK_C) to one row of an image y (H, W, C), except those outside."""
    mask = ((row < H) & (columns < W))[:, None] & (channels < C)[None, :]
    tl.store(y + (row * W + columns)[:, None] * C + channels[None, :], values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _load_taps(kernels, channels, C, tap_stride, channel_stride, K: tl.constexpr, dtype: tl.constexpr):
    """The K² taps of one sample, each (1, BLOCK_C)."""
    taps = ()
    for tap in tl.static_range(K * K):
        value = tl.load(kernels + tap * tap_stride + channels * channel_stride, mask=channels < C, other=0)
        taps = taps + (value.to(dtype)[None, :],)
    return taps


@triton.jit
def _zeros(count: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, dtype: tl.constexpr):
    sums = ()
    for _ in tl.static_range(count):
        sums = sums + (tl.zeros((BLOCK_W, BLOCK_C), dtype),)
    return sums


@triton.autotune(configs=FORWARD_CONFIGURATIONS, key=SHAPE, prune_configs_by=FITTING)
@triton.jit
def forward_kernel(
    x,
    kernels,
    y,
    sample_stride,
    channel_stride,
    tap_stride,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program computes ROWS rows of BLOCK_W columns and BLOCK_C channels of one sample; channels vary fastest."""
    program = tl.program_id(0)
    channel_blocks, column_blocks, strips = tl.cdiv(C, BLOCK_C), tl.cdiv(W, BLOCK_W), tl.cdiv(H, ROWS)
    channels = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = program // channel_blocks % column_blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    first = program // (channel_blocks * column_blocks) % strips * ROWS
    sample = (program // (channel_blocks * column_blocks * strips)).to(tl.int64)
    x += sample * H * W * C
    y += sample * H * W * C

    # Row i of x, shifted by v columns, contributes to the K rows i - K//2 … i + K//2 of y: a rolling window of sums.
    taps = _load_taps(kernels + sample * sample_stride, channels, C, tap_stride, channel_stride, K, dtype)
    sums = _zeros(K, BLOCK_W, BLOCK_C, dtype)
    for step in tl.static_range(ROWS + K - 1):
        for v in tl.static_range(K):
            tokens = _load_row(x, first + step - K // 2, columns + (v - K // 2), channels, H, W, C, dtype)
            added = ()
            for u in tl.static_range(K):  # sums[K - 1 - u] is the output row that reads this row through tap row u
                added = (sums[K - 1 - u] + tokens * taps[u * K + v],) + added
            sums = added
        if step >= K - 1:
            _store_row(y, sums[0], first + step - (K - 1), columns, channels, H, W, C)
        sums = sums[1:] + _zeros(1, BLOCK_W, BLOCK_C, dtype)


@triton.autotune(configs=BACKWARD_CONFIGURATIONS, key=SHAPE, prune_configs_by=FITTING)
@triton.jit
def backward_kernel(
    dy,
    x,
    kernels,
    dx,
    dkernels,
    sample_stride,
    channel_stride,
    tap_stride,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_W columns and BLOCK_C channels of one sample, from the first row to the last.

    It writes the kernel gradient of its columns: dkernels (B, column blocks, K², C), to be summed over the second axis.
    """
    program = tl.program_id(0)
    channel_blocks, column_blocks = tl.cdiv(C, BLOCK_C), tl.cdiv(W, BLOCK_W)
    channels = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = program // channel_blocks % column_blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    sample = (program // (channel_blocks * column_blocks)).to(tl.int64)
    x += sample * H * W * C
    dx += sample * H * W * C
    dy += sample * H * W * C
    dkernels += (program // channel_blocks).to(tl.int64) * K * K * C

    taps = _load_taps(kernels + sample * sample_stride, channels, C, tap_stride, channel_stride, K, dtype)
    dtaps = _zeros(K * K, BLOCK_W, BLOCK_C, dtype)
    for first in range(0, H, ROWS):
        # Row i of dy, shifted, meets the K rows i - K//2 … i + K//2 of x: for their gradient and for that of the taps.
        rows = _zeros(K, BLOCK_W, BLOCK_C, dtype)
        sums = _zeros(K, BLOCK_W, BLOCK_C, dtype)
        for step in tl.static_range(ROWS + K - 1):
            if step < ROWS:
                rows = rows[1:] + (_load_row(x, first + step, columns, channels, H, W, C, dtype),)
            else:
                rows = rows[1:] + _zeros(1, BLOCK_W, BLOCK_C, dtype)
            sums = sums[1:] + _zeros(1, BLOCK_W, BLOCK_C, dtype)
            for v in tl.static_range(K):
                gradient = _load_row(dy, first + step - K // 2, columns - (v - K // 2), channels, H, W, C, dtype)
                for u in tl.static_range(K):
                    if (step + u >= K - 1) and (step + u < ROWS + K - 1):  # only rows of this strip
                        sums = sums[:u] + (sums[u] + gradient * taps[u * K + v],) + sums[u + 1 :]
                        one_more = (dtaps[u * K + v] + gradient * rows[u],)
                        dtaps = dtaps[: u * K + v] + one_more + dtaps[u * K + v + 1 :]
            if step >= K - 1:
                _store_row(dx, sums[0], first + step - (K - 1), columns, channels, H, W, C)
    for tap in tl.static_range(K * K):
        tl.store(dkernels + tap * C + channels, tl.sum(dtaps[tap], axis=0), mask=channels < C)
