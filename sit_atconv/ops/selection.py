"""Which backend "auto" means: the fastest one of the measurements in measurements.json.

`python -m benchmarks.backends --write` makes that file anew on the machine at hand, for the device it has. The
environment variable SIT_ATCONV_DEPTHWISE, read at import, forces one backend instead.
"""

import importlib.util
import json
import os
from importlib import resources

import torch
from torch import Tensor

FORCED = os.environ.get("SIT_ATCONV_DEPTHWISE", "auto")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

Case = tuple[str, torch.dtype, bool, bool]  # device, dtype, compiled, with gradients


def load_rules(text: str) -> dict[Case, list[tuple[int, str]]]:
    """For each case the measured sizes H·W·C, ascending, each with the backend that took least time."""
    rules: dict[Case, list[tuple[int, str]]] = {}
    for row in sorted(json.loads(text)["rows"], key=lambda row: row["numbers"]):
        case = (row["device"], getattr(torch, row["dtype"]), row["compiled"], row["gradients"])
        times = row["milliseconds"]
        if row["compiled"] and row["gradients"]:  # Inductor fails at a grouped convolution's gradient for varying grids
            times = {name: ms for name, ms in times.items() if name != "grouped"}
        fastest = min(times, key=times.get)
        rules.setdefault(case, []).append((row["numbers"], fastest))
    return rules


RULES = load_rules(resources.files("sit_atconv.ops").joinpath("measurements.json").read_text())


def choose_backend(x: Tensor, kernels: Tensor) -> str:
    """The backend for x (B, H, W, C). It does not depend on B: a compiled program serves every batch size."""
    if FORCED != "auto":
        return FORCED
    compiled = torch.compiler.is_compiling()
    gradients = torch.is_grad_enabled() and (x.requires_grad or kernels.requires_grad)
    rules = RULES.get((x.device.type, x.dtype, compiled, gradients))
    if rules is None:  # never measured, as all of CUDA so far: torch's own operations, whatever a GPU makes of ours
        if x.device.type == "cpu":
            return "folded"
        return "shifted" if compiled else "grouped"
    numbers = x.shape[1] * x.shape[2] * x.shape[3]
    for measured, backend in rules:
        if numbers <= measured:
            return backend
    return rules[-1][1]
