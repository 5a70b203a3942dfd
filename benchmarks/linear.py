"""Linear layers on a CPU, ours beside torch's own: `python -m benchmarks.linear [--json FILE]`.

On other devices ours are torch's. The sizes are a block's: tokens of two images by widths of S, B and XL, in and out of
the MLP, and a modulation of two conditions.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing import Run, command_line, default_device, machine, median_milliseconds, write_json
from sit_atconv.ops import linear

LAYERS = {"torch": F.linear, "ours": linear}
SIZES = (  # rows, in, out
    (512, 384, 384),
    (512, 384, 1536),
    (512, 768, 768),
    (512, 768, 3072),
    (512, 3072, 768),
    (512, 1152, 4608),
    (2, 768, 4608),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path("linear.json"))
    options = parser.parse_args()
    device = default_device()
    print(f"{machine(device)}. Milliseconds; in brackets GFLOP/s.\n")
    print(f"{'rows':>5} {'in':>5} {'out':>5} {'':15}" + "".join(f"{name:>16}" for name in LAYERS))
    rows = []
    for size in SIZES:
        for gradients in (False, True):
            rows.append(measure(size, gradients, device, options.turns))
            print(line(rows[-1]))
    write_json(options.json, command_line(), device, rows)


def measure(size: tuple[int, int, int], gradients: bool, device: torch.device, turns: int) -> dict:
    """One size (rows, in, out), both in turns."""
    count, inputs, outputs = size
    torch.manual_seed(0)
    x = torch.randn(count, inputs, device=device, requires_grad=gradients)
    weight = torch.randn(outputs, inputs, device=device, requires_grad=gradients)
    bias = torch.randn(outputs, device=device, requires_grad=gradients)
    runs: dict[str, Run] = {name: partial(layer, x, weight, bias) for name, layer in LAYERS.items()}
    if gradients:
        dy = torch.randn(count, outputs, device=device)
        runs = {
            name: lambda layer=layer: torch.autograd.grad(layer(x, weight, bias), (x, weight, bias), dy)
            for name, layer in LAYERS.items()
        }
    return {"size": size, "gradients": gradients, "milliseconds": median_milliseconds(runs, device, turns)}


def line(row: dict) -> str:
    rows, inputs, outputs = row["size"]
    operations = 2 * rows * inputs * outputs * (3 if row["gradients"] else 1)
    cells = [f"{ms:.3f} [{operations / ms / 1e6:.0f}]" for ms in row["milliseconds"].values()]
    passes = "with gradients" if row["gradients"] else "forward"
    return f"{rows:5} {inputs:5} {outputs:5} {passes:15}" + "".join(f"{cell:>16}" for cell in cells)


if __name__ == "__main__":
    main()
