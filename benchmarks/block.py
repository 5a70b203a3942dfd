"""Compares blocks that differ in their mixer, and the mixers alone: `python -m benchmarks.block [--mixers NAME ...]`.

Table VIII of the ATConv paper (arXiv 2510.20092) compares whole models, whose time is spent in the blocks. Without
`--mixers` the contenders are attention, ATConv, and ATConv as released: all tokens are projected before pooling, and a
grouped convolution runs between transposes. `--mixers --size S --sides 16 32 64` gives the table of docs/mixers.md.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.baselines import ReleasedATConv, ReleasedBlock
from benchmarks.mixers import add_mixers
from benchmarks.output import write_json
from sit_atconv.errors import exit_on_input_error
from sit_atconv.models.block import Block
from sit_atconv.models.flops import block_flops
from sit_atconv.models.mixers import create_mixer, list_mixers, mixer_flops
from sit_atconv.models.registry import SIZES
from sit_atconv.runtime.measuring.memory import peak_mebibytes
from sit_atconv.runtime.measuring.records import machine, table
from sit_atconv.runtime.measuring.timing import Run, default_device, median_milliseconds

RELEASED = "released"
DEFAULTS = {  # width, heads, side
    "cpu": ((384, 6, 16), (768, 12, 16), (768, 12, 32), (1152, 16, 16), (1152, 16, 32)),
    "cuda": ((1152, 16, 16), (1152, 16, 32), (1152, 16, 64)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    add_mixers(parser)
    parser.add_argument("--size", choices=SIZES, help="width and heads of a model; default: several")
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32], help="of the grids of tokens, for --size")
    parser.add_argument("--batch-size", type=int, help="default: 2 on a CPU, 64 on a GPU")
    parser.add_argument("--compile", action="store_true", help="compile all contenders with torch.compile")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("block.json"))
    options = parser.parse_args()
    device = default_device()
    B = options.batch_size or (64 if device.type == "cuda" else 2)
    names = ["attention", "atconv", RELEASED] if options.mixers is None else options.mixers or list_mixers()
    sizes = DEFAULTS[device.type]
    if options.size:
        dim, heads = SIZES[options.size]["hidden_size"], SIZES[options.size]["num_heads"]
        sizes = [(dim, heads, side) for side in options.sides]
    rows = []
    print(f"{machine(device)}, batch {B}. The first in ms, the others relative to it.\n")
    print(f"{'C':>6} {'tokens':>7} {'':6} {'':15}" + "".join(f" {name:>9}" for name in names))
    for size in sizes:
        for whole in (True, False):
            for gradients in (False, True):
                rows.append(measure(names, size, B, whole, gradients, options, device))
                print(line(rows[-1]), flush=True)
    print(f"\n{table(summary(rows))}")
    write_json(options.json, device, rows, batch=B, compiled=options.compile)


def measure(
    names: list[str],
    size: tuple[int, int, int],
    B: int,
    whole: bool,
    gradients: bool,
    options: argparse.Namespace,
    device: torch.device,
) -> dict:
    """Measure all contenders in turns for one size (width, heads, side), as a whole block or only its mixer."""
    dim, heads, side = size
    torch.manual_seed(0)
    torch.compiler.reset()
    runs, operations = {}, {}
    for name in names:
        block = Block(dim, ReleasedATConv(dim) if name == RELEASED else create_mixer(name, dim, heads), 4.0)
        operations[name] = block_flops(block, (side, side)) if whole else mixer_flops(block.mixer, (side, side), dim)
        if name == RELEASED:
            block = ReleasedBlock(copy.deepcopy(block))
        module = (block if whole else block.mixer).to(device)
        function = torch.compile(module) if options.compile else module
        runs[name] = call(function, torch.randn(B, side**2, dim, device=device), side, whole, gradients)
    return {
        "dim": dim,
        "tokens": side**2,
        "block": whole,
        "gradients": gradients,
        "milliseconds": median_milliseconds(runs, device, options.turns),
        "mebibytes": {name: peak_mebibytes(run, device) for name, run in runs.items()},
        "operations": operations,
    }


def call(module: nn.Module, x: Tensor, side: int, whole: bool, gradients: bool) -> Run:
    """A forward pass, under bf16 autocast on a GPU and in fp32 on a CPU; optionally with gradients."""
    arguments = (torch.randn(len(x), x.shape[-1], device=x.device), (side, side)) if whole else ((side, side),)
    wanted = [x.requires_grad_(gradients), *module.parameters()]

    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda), torch.set_grad_enabled(gradients):
            return module(x, *arguments)

    return (lambda: torch.autograd.grad(forward().float().sum(), wanted)) if gradients else forward


def line(row: dict) -> str:
    first, *others = row["milliseconds"].values()
    what, passes = "block" if row["block"] else "mixer", "with gradients" if row["gradients"] else "forward"
    ratios = "".join(f" {ms / first:9.2f}" for ms in others)
    return f"{row['dim']:6} {row['tokens']:7} {what:6} {passes:15} {first:9.2f}{ratios}"


def summary(rows: list[dict]) -> list[dict[str, str]]:
    """A line for each contender and width: milliseconds and peak MiB, forward / with gradients, and operations."""
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        what = "block" if row["block"] else "mixer alone"
        for name, ms in row["milliseconds"].items():
            shown = lines.setdefault((row["dim"], name, what), {"mixer": name, "measured": what, "C": str(row["dim"])})
            for unit, number in (("ms", ms), ("MiB", row["mebibytes"][name])):
                cell = f"{row['tokens']} tokens: {unit}"
                text = "-" if number is None else f"{number:.4g}"
                shown[cell] = f"{shown[cell]} / {text}" if row["gradients"] else text
            shown[f"{row['tokens']} tokens: GFLOP an image"] = f"{row['operations'][name] / 1e9:.3g}"
    return list(lines.values())


if __name__ == "__main__":
    with exit_on_input_error():
        main()
