"""Compares an ATConv block with an attention block, and both mixers: `python -m benchmarks.block [--json FILE]`.

Table VIII of the ATConv paper (arXiv 2510.20092) compares whole models, whose time is spent in the blocks. The third
contender is ATConv as released: all tokens are projected before pooling, and a grouped convolution runs between
transposes.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.baselines import ReleasedATConv, ReleasedBlock
from benchmarks.timing import Run, command_line, default_device, machine, median_milliseconds, write_json
from sit_atconv.models.block import Block
from sit_atconv.models.mixers import ATConv, Attention

SIZES = {  # width, heads, side
    "cpu": ((384, 6, 16), (768, 12, 16), (768, 12, 32), (1152, 16, 16), (1152, 16, 32)),
    "cuda": ((1152, 16, 16), (1152, 16, 32), (1152, 16, 64)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("--batch-size", type=int, help="default: 2 on a CPU, 64 on a GPU")
    parser.add_argument("--compile", action="store_true", help="compile all contenders with torch.compile")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("block.json"))
    options = parser.parse_args()
    device = default_device()
    B = options.batch_size or (64 if device.type == "cuda" else 2)
    rows = []
    print(f"{machine(device)}, batch {B}. Attention in ms, the others relative to it.\n")
    print(f"{'C':>6} {'tokens':>7} {'':6} {'':15} {'attention':>10} {'ATConv':>8} {'released':>9}")
    for size in SIZES[device.type]:
        for whole in (True, False):
            for gradients in (False, True):
                rows.append(measure(size, B, whole, gradients, options, device))
                print(line(rows[-1]))
    write_json(options.json, command_line(), device, rows, batch=B, compiled=options.compile)


def measure(
    size: tuple[int, int, int], B: int, whole: bool, gradients: bool, options: argparse.Namespace, device: torch.device
) -> dict:
    """Measure all contenders in turns for one size (width, heads, side), as a whole block or only its mixer."""
    dim, heads, side = size
    torch.manual_seed(0)
    torch.compiler.reset()
    modules = {"attention": Attention(dim, heads), "ATConv": ATConv(dim), "released": ReleasedATConv(dim)}
    if whole:
        modules = {"attention": Block(dim, modules["attention"], 4.0), "ATConv": Block(dim, modules["ATConv"], 4.0)}
        modules["released"] = ReleasedBlock(copy.deepcopy(modules["ATConv"]))
    runs = {}
    for name, module in modules.items():
        function = torch.compile(module.to(device)) if options.compile else module.to(device)
        runs[name] = call(function, torch.randn(B, side**2, dim, device=device), side, whole, gradients)
    times = median_milliseconds(runs, device, options.turns)
    return {"dim": dim, "tokens": side**2, "block": whole, "gradients": gradients, "milliseconds": times}


def call(module: nn.Module, x: Tensor, side: int, whole: bool, gradients: bool) -> Run:
    """A forward pass, under bf16 autocast on a GPU and in fp32 on a CPU; optionally with gradients."""
    arguments = (torch.randn(len(x), x.shape[-1], device=x.device), (side, side)) if whole else ((side, side),)
    wanted = [x.requires_grad_(gradients), *module.parameters()]

    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda), torch.set_grad_enabled(gradients):
            return module(x, *arguments)

    return (lambda: torch.autograd.grad(forward().float().sum(), wanted)) if gradients else forward


def line(row: dict) -> str:
    ms = row["milliseconds"]
    what, passes = "block" if row["block"] else "mixer", "with gradients" if row["gradients"] else "forward"
    ratios = f"{ms['ATConv'] / ms['attention']:8.2f} {ms['released'] / ms['attention']:9.2f}"
    return f"{row['dim']:6} {row['tokens']:7} {what:6} {passes:15} {ms['attention']:10.2f} {ratios}"


if __name__ == "__main__":
    main()
