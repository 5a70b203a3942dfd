"""Networks run on images in groups of one fixed size, so that an image's features do not depend on its company."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sit_atconv.runtime.threads import single_threaded_pool


class Grouped:
    """`forward`, uint8 images (group, 3, H, W) -> features by kind, for batches of any size.

    Kernels choose their order of summation by the shape of a batch and the number of threads, which moves features by
    1e-6. Here every group is full (the last one padded) and, on a CPU, computed by one thread, with as many groups at a
    time as there are threads: the same bits from any batch size, number of processes or threads, and no waiting at
    every layer.
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
        images = images.to(self._device).contiguous()  # the layout of memory chooses kernels too
        with torch.autocast(self._device.type, enabled=False):  # whatever surrounds the call
            return {kind: features[:count] for kind, features in self._forward(images).items()}


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no autotuned kernels; what was set before is set again. For one thread at a time."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
