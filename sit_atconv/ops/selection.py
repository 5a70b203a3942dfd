"""Chooses the backend for "auto": the fastest one according to measurements.json.

`python -m benchmarks.backends --write` writes that file again for this machine's device. On a GPU without measurements,
"auto" is Triton where that works, and "shifted" under a compiler. Programs exported by torch.export or to ONNX hold the
shifted form, which needs no operator of ours and, unlike a convolution with a group for every sample, works in ONNX for
any batch size. The environment variable SIT_ATCONV_DEPTHWISE, read at import, forces one backend instead.
"""

import importlib.util
import json
import logging
import os
from functools import cache, partial
from importlib import resources

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sit_atconv.ops.registration import is_exported, is_transformed

FORCED = os.environ.get("SIT_ATCONV_DEPTHWISE", "auto")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

log = logging.getLogger(__name__)

Case = tuple[str, torch.dtype, bool, bool]  # device, dtype, compiled, with gradients


def load_rules(text: str) -> dict[Case, list[tuple[int, str]]]:
    """For each case, the measured sizes H·W·C in ascending order, each with the fastest backend."""
    rules: dict[Case, list[tuple[int, str]]] = {}
    for row in sorted(json.loads(text)["rows"], key=lambda row: row["numbers"]):
        case = (row["device"], getattr(torch, row["dtype"]), row["compiled"], row["gradients"])
        times = row["milliseconds"]
        if row["compiled"] and row["gradients"]:  # Inductor fails on a grouped convolution's gradient when grids vary
            times = {name: ms for name, ms in times.items() if name != "grouped"}
        fastest = min(times, key=times.get)
        rules.setdefault(case, []).append((row["numbers"], fastest))
    return rules


RULES = load_rules(resources.files("sit_atconv.ops").joinpath("measurements.json").read_text())


def _has_triton(x: Tensor) -> bool:
    return (
        TRITON_INSTALLED
        and x.is_cuda
        and torch.cuda.is_available()  # a fake tensor may be on a GPU that does not exist
        and not torch.jit.is_tracing()
        and not is_transformed()
        and is_triton_right(x.device)
    )


@cache
def is_triton_right(device: torch.device) -> bool:
    """Whether both Triton kernels compile for a device and agree with torch: tried once, on a small image.

    Compiling takes seconds and needs a C compiler and Python's headers, which not every machine with a GPU has.
    """
    operators = torch.ops.sit_atconv
    random = partial(torch.randn, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64, device="cpu")
    with _disable_current_modes(), torch.no_grad():  # with real tensors, even while a compiler traces
        x, dy, kernels = random(2, 4, 4, 32), random(2, 4, 4, 32), random(2, 32, 3, 3)
        expected = operators.depthwise_folded(x, kernels), *operators.depthwise_folded_backward(dy, x, kernels)
        x, dy, kernels = (tensor.to(device, torch.float32) for tensor in (x, dy, kernels))
        try:
            found = operators.depthwise_triton(x, kernels), *operators.depthwise_triton_backward(dy, x, kernels)
            found = tuple(tensor.cpu().double() for tensor in found)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        except Exception as problem:  # errors of Triton, compilers and drivers have no common class
            log.warning("Triton's convolution does not work on %s, torch's takes its place: %s", device, problem)
            return False
    return True


def choose_backend(x: Tensor, kernels: Tensor) -> str:
    """The backend for x (B, H, W, C). It does not depend on B, since one compiled program serves every batch size."""
    if FORCED != "auto":
        return FORCED
    if is_exported():
        return "shifted"
    compiled = torch.compiler.is_compiling()
    gradients = torch.is_grad_enabled() and (x.requires_grad or kernels.requires_grad)
    rules = RULES.get((x.device.type, x.dtype, compiled, gradients))
    if rules is None:  # never measured
        if x.device.type == "cpu":
            return "folded"
        if compiled:
            return "shifted"
        return "triton" if _has_triton(x) else "grouped"
    numbers = x.shape[1] * x.shape[2] * x.shape[3]
    for measured, backend in rules:
        if numbers <= measured:
            return backend
    return rules[-1][1]
