"""Compares the backends of the operator: `python -m benchmarks.backends [--write]`.

With --write, the measurements of this machine's device replace those of the same dtypes in
sit_atconv/ops/measurements.json, from which "auto" chooses. On a CPU, run it with OMP_NUM_THREADS=1.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.output import write_json
from sit_atconv.ops import BACKENDS, per_sample_depthwise_conv2d
from sit_atconv.runtime.measuring.records import machine
from sit_atconv.runtime.measuring.timing import Run, default_device, median_milliseconds

SIZES = {
    "cpu": ((4, 384), (8, 384), (16, 192), (16, 384), (16, 768), (32, 1152)),
    "cuda": ((16, 384), (16, 1152), (32, 1152), (64, 1152)),
}
BATCH = {"cpu": 8, "cuda": 64}
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float16", "float32")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES["cuda"], metavar="NAME")
    parser.add_argument("--write", action="store_true", help="write the measurements into the package")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them to this file, too")
    options = parser.parse_args()
    device = default_device()
    dtypes = options.dtypes or DTYPES[device.type]
    rows = [measured(case, device, options.turns) | {"machine": machine(device)} for case in cases(device, dtypes)]
    for row in rows:
        times = "   ".join(f"{name} {ms:.3f}" for name, ms in row["milliseconds"].items())
        flags = ("compiled" if row["compiled"] else "eager", "with gradients" if row["gradients"] else "forward")
        print(f"{row['shape']!s:22} {row['dtype']:9} {flags[0]:9} {flags[1]:15} ms: {times}")
    if options.write:
        path = Path(str(resources.files("sit_atconv.ops").joinpath("measurements.json")))
        measured_now = {(device.type, name) for name in dtypes}
        kept = [
            row for row in json.loads(path.read_text())["rows"] if (row["device"], row["dtype"]) not in measured_now
        ]
        write_json(path, device, kept + rows)
    if options.json:
        write_json(options.json, device, rows)


def cases(device: torch.device, dtypes: Sequence[str]) -> Iterator[dict]:
    """All cases of these dtypes that "auto" distinguishes."""
    for dtype in dtypes:
        for compiled in (False, True):
            for gradients in (False, True):
                for side, channels in SIZES[device.type]:
                    shape = [BATCH[device.type], side, side, channels]
                    case = {"device": device.type, "dtype": dtype, "compiled": compiled}
                    yield case | {"gradients": gradients, "numbers": side * side * channels, "shape": shape}


def measured(case: dict, device: torch.device, turns: int) -> dict:
    """The case with each backend's median; "copy" is the time of one copy of x."""
    torch.compiler.reset()  # every case is compiled for its own sizes
    dtype = getattr(torch, case["dtype"])
    x = torch.randn(case["shape"], device=device, dtype=dtype, requires_grad=case["gradients"])
    B, C = case["shape"][0], case["shape"][-1]
    kernels = torch.randn(B, C, 3, 3, device=device, dtype=dtype, requires_grad=case["gradients"])
    contenders = {
        name: contender(name, x, kernels, case["compiled"])
        for name in BACKENDS
        if name != "triton" or device.type == "cuda"
    }
    times = median_milliseconds({"copy": x.detach().clone, **contenders}, device, turns)
    copy = times.pop("copy")
    return case | {"copy": copy, "milliseconds": times}


def contender(name: str, x: Tensor, kernels: Tensor, compiled: bool) -> Run:
    """One call of a backend, with both gradients if x requires one."""
    function = partial(per_sample_depthwise_conv2d, backend=name)
    if compiled:
        function = torch.compile(function, fullgraph=True)
    if not x.requires_grad:
        return lambda: function(x, kernels)
    dy = torch.randn_like(x)
    return lambda: torch.autograd.grad(function(x, kernels), (x, kernels), dy)


if __name__ == "__main__":
    main()
