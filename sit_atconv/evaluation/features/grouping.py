"""Runs networks on groups of a fixed number of samples, so that results do not depend on the rest of the batch."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sit_atconv.runtime.cpu import single_threaded_pool


class Grouped:
    """Applies `forward`, tensors (group, ...) -> results by name, (group, ...) each, to batches of any size.

    Kernels choose their order of summation by batch shape and number of threads, which changes results by 1e-6. Here
    every group is full (the last one is padded) and, on a CPU, computed by one thread, with one group per thread at a
    time. The result has the same bits for any batch size and number of processes or threads, and threads do not wait
    for one another at every layer.
    """

    def __init__(self, forward: Callable[..., dict[str, Tensor]], device: torch.device, group: int) -> None:
        self._forward, self._device, self._group = forward, device, group

    def __call__(self, *batch: Tensor) -> dict[str, Tensor]:
        """The results for a batch of tensors (B, ...), (B, ...) each, on the device."""
        groups = list(zip(*(tensor.split(self._group) for tensor in batch), strict=True))
        with full_precision():
            if self._device.type == "cpu":
                with single_threaded_pool(min(torch.get_num_threads(), len(groups))) as pool:
                    results = list(pool.map(self._run, groups))
            else:
                results = [self._run(group) for group in groups]
        return {name: torch.cat([result[name] for result in results]) for name in results[0]}

    @torch.inference_mode()
    def _run(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        count = len(tensors[0])
        if count < self._group:
            tensors = [torch.cat([t, t[-1:].expand(self._group - count, *t.shape[1:])]) for t in tensors]
        # The choice of kernels depends on the memory layout, too
        tensors = [tensor.to(self._device).contiguous() for tensor in tensors]
        with torch.autocast(self._device.type, enabled=False):  # even if the caller uses autocast
            return {name: result[:count] for name, result in self._forward(*tensors).items()}


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
