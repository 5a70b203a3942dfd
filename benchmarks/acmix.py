"""Time and memory of ACmix's local form, ours and as released: `python -m benchmarks.acmix [--json FILE]`.

Both have the same weights, and measure in turns within one run. The release copies keys, values and coordinates for
every one of the 49 neighbours.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.output import write_json
from sit_atconv.models.mixers.acmix import ACmix, convert_acmix
from sit_atconv.runtime.measuring.memory import peak_mebibytes
from sit_atconv.runtime.measuring.records import machine
from sit_atconv.runtime.measuring.timing import Run, default_device, median_milliseconds

SIZE = 7  # side of a neighbourhood
SHAPES = ((64, 4, 56), (384, 6, 16), (384, 6, 32))  # width, heads, side; the first is a stage of the released ResNets


class ReleasedACmix(nn.Module):
    """The module of the released ResNets, transcribed from a description: maps (B, C, H, W), sides of at least 4.

    The parameters have the release's names and shapes.
    """

    def __init__(self, dim: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(dim, dim, 1) for _ in range(3))
        self.conv_p = nn.Conv2d(2, self.head_dim, 1)
        self.fc = nn.Conv2d(3 * heads, 9, 1, bias=False)
        self.dep_conv = nn.Conv2d(9 * self.head_dim, dim, 3, padding=1, groups=self.head_dim, bias=False)
        self.rate1, self.rate2 = (nn.Parameter(torch.full((1,), 0.5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.conv1(x), self.conv2(x), self.conv3(x)
        return self.rate1 * self._attention(q, k, v) + self.rate2 * self._convolution(q, k, v)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, C, H, W = q.shape
        d = self.head_dim
        columns = torch.linspace(-1, 1, W, dtype=q.dtype, device=q.device).expand(H, W)
        rows = torch.linspace(-1, 1, H, dtype=q.dtype, device=q.device).unsqueeze(1).expand(H, W)
        position = self.conv_p(torch.stack([columns, rows]).unsqueeze(0))
        q = d**-0.5 * q.view(B * self.heads, d, 1, H, W)
        keys, values = (_neighbours(part.view(B * self.heads, d, H, W)) for part in (k, v))
        scores = (q * (keys + position.unsqueeze(2) - _neighbours(position))).sum(1, keepdim=True)
        return (scores.softmax(2) * values).sum(2).view(B, C, H, W)

    def _convolution(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, H, W = q.shape
        maps = torch.cat([part.view(B, self.heads, self.head_dim, H * W) for part in (q, k, v)], dim=1)
        mixed = self.fc(maps).permute(0, 2, 1, 3).reshape(B, -1, H, W)
        return self.dep_conv(mixed)


def _neighbours(x: Tensor) -> Tensor:
    """The neighbours of every position, reflected at the borders: (B, d, H, W) -> (B, d, 49, H, W)."""
    B, d, H, W = x.shape
    padded = F.pad(x, [SIZE // 2] * 4, mode="reflect")
    return F.unfold(padded, SIZE).view(B, d, SIZE**2, H, W)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("acmix.json"))
    options = parser.parse_args()
    device = default_device()
    print(f"{machine(device)}, batch {options.batch_size}. Milliseconds; peak MiB in brackets.\n")
    print(f"{'C':>5} {'side':>5} {'':15} {'ACmix':>18} {'released':>18} {'speed-up':>9} {'memory':>8}")
    rows = []
    for shape in SHAPES:
        for gradients in (False, True):
            rows.append(measure(shape, options.batch_size, gradients, device, options.turns))
            print(line(rows[-1]))
    write_json(options.json, device, rows, batch=options.batch_size)


def measure(shape: tuple[int, int, int], B: int, gradients: bool, device: torch.device, turns: int) -> dict:
    """Measure both in turns for one shape (width, heads, side)."""
    dim, heads, side = shape
    released, ours = ReleasedACmix(dim, heads), ACmix(dim, heads, neighbourhood=SIZE)
    ours.load_state_dict(convert_acmix(released.state_dict()))
    x = torch.randn(B, dim, side, side, device=device)
    inputs = {"ACmix": (x.flatten(2).mT.contiguous(), (side, side)), "released": (x,)}
    modules = {"ACmix": ours.to(device), "released": released.to(device)}
    runs = {name: call(modules[name], *inputs[name], gradients=gradients) for name in modules}
    return {
        "dim": dim,
        "side": side,
        "gradients": gradients,
        "milliseconds": median_milliseconds(runs, device, turns),
        "mebibytes": {name: peak_mebibytes(run, device) for name, run in runs.items()},
    }


def call(module: nn.Module, x: Tensor, *arguments: object, gradients: bool) -> Run:
    """A forward pass, optionally with the gradients of x and all weights."""
    wanted = [x.requires_grad_(gradients), *module.parameters()]

    def forward() -> Tensor:
        with torch.set_grad_enabled(gradients):
            return module(x, *arguments)

    return (lambda: torch.autograd.grad(forward().sum(), wanted)) if gradients else forward


def line(row: dict) -> str:
    """A row of the table; the last two columns compare ACmix with the release."""
    ms, mebibytes = row["milliseconds"], row["mebibytes"]
    cells = []
    for name in ms:
        memory = "" if mebibytes[name] is None else f" [{mebibytes[name]:.0f}]"
        cells.append(f"{ms[name]:.1f}{memory}")
    memory = "" if None in mebibytes.values() else f"{mebibytes['ACmix'] / mebibytes['released']:8.3f}"
    passes = "with gradients" if row["gradients"] else "forward"
    ratio = ms["released"] / ms["ACmix"]
    return f"{row['dim']:5} {row['side']:5} {passes:15} {cells[0]:>18} {cells[1]:>18} {ratio:9.1f} {memory}"


if __name__ == "__main__":
    main()
