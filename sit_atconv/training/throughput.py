"""What a training step costs and how much of the device's peak it uses."""

import resource
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.models import SiT

# Dense bf16 tensor-core peaks in FLOP/s, from the vendor's data sheets, by a part of the device's name.
_BF16_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def training_flops(model: SiT, latent_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one training step for one image: three times the forward pass, counted by torch.

    The teacher's and the projectors' are not counted.
    """
    with torch.device("meta"):
        twin = SiT.from_config(model.config)
        x, t = torch.empty(1, *latent_shape), torch.empty(1)
        y = torch.empty(1, dtype=torch.int64) if model.config.num_classes else None
        with FlopCounterMode(display=False) as counter:
            twin(x, t, y)
    return 3 * counter.get_total_flops()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak at this precision in FLOP/s; None where it is not known (CPUs, fp32)."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _BF16_PEAKS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far, in GiB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
