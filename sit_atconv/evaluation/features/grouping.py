"""Runs networks on groups of a fixed number of images, so that features do not depend on the rest of the batch."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sit_atconv.runtime.cpu import single_threaded_pool


class Grouped:
    """Applies `forward`, uint8 images (group, 3, H, W) -> features by kind, to batches of any size.

    Kernels choose their order of summation by batch shape and number of threads, which changes features by 1e-6. Here
    every group is full (the last one is padded) and, on a CPU, computed by one thread, with one group per thread at a
    time. The result has the same bits for any batch size and number of processes or threads, and threads do not wait
    for one another at every layer.
    """

    def __init__(self, forward: Callable[[Tensor], dict[str, Tensor]], device: torch.device, group: int) -> None:
        self._forward, self._device, self._group = forward, device, group

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of all images, (B, d) each, on the device."""
        groups = images.split(self._group)
        with full_precision():
            if self._device.type == "cpu":
                with single_threaded_pool(min(torch.get_num_threads(), len(groups))) as pool:
                    results = list(pool.map(self._run, groups))
            else:
                results = [self._run(group) for group in groups]
        return {kind: torch.cat([result[kind] for result in results]) for kind in results[0]}

    @torch.inference_mode()
    def _run(self, images: Tensor) -> dict[str, Tensor]:
        count = len(images)
        if count < self._group:
            images = torch.cat([images, images[-1:].expand(self._group - count, -1, -1, -1)])
        images = images.to(self._device).contiguous()  # the choice of kernels depends on the memory layout, too
        with torch.autocast(self._device.type, enabled=False):  # even if the caller uses autocast
            return {kind: features[:count] for kind, features in self._forward(images).items()}


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Disable TF32 and autotuned kernels, and restore the settings afterwards. Not thread-safe."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
