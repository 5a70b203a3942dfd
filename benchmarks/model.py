"""Whole models: Table VIII and Fig. 6 of the ATConv paper (arXiv 2510.20092): `python -m benchmarks.model`.

For each size: attention, hybrid and ATConv models in turns, forward passes of one batch without gradients, at several
latent sizes. The published ratios of ATConv to attention are 0.811 (XL/2, latent 32) and 0.774 (latent 64).
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from benchmarks.timing import Run, default_device, machine, median_milliseconds, peak_mebibytes, write_json
from sit_atconv import SiT, create_model

FAMILIES = ("SiT", "SiT-Hybrid", "SiT-ATConv")
DEFAULTS = {"cpu": (["S/2"], [16, 32], 2), "cuda": (["B/2", "L/2", "XL/2"], [32, 64, 128], 64)}


def main() -> None:
    device = default_device()
    sizes, latents, batch = DEFAULTS[device.type]
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", default=sizes, help="such as B/2 XL/2")
    parser.add_argument("--latents", type=int, nargs="+", default=latents, help="height and width of a latent")
    parser.add_argument("--batch-size", type=int, default=batch)
    parser.add_argument("--compile", action="store_true", help="the repeated block of each model by torch.compile")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{machine(device)}, batch {options.batch_size}. Milliseconds an image; ratios to attention.\n")
    print(f"{'size':6} {'latent':>6} {'attention':>10} {'hybrid':>10} {'ATConv':>10} {'hybrid':>8} {'ATConv':>8}")
    for size in options.sizes:
        for latent in options.latents:
            rows.append(measure(size, latent, options, device))
            ms = [rows[-1]["milliseconds"][family] / options.batch_size for family in FAMILIES]
            print(f"{size:6} {latent:6} " + " ".join(f"{m:10.2f}" for m in ms), end=" ")
            print(" ".join(f"{m / ms[0]:8.3f}" for m in ms[1:]))
    write_json(options.json, "python -m benchmarks.model", device, rows)


def measure(size: str, latent: int, options: argparse.Namespace, device: torch.device) -> dict:
    """The three families at one size, in turns."""
    torch.compiler.reset()
    runs = {}
    for family in FAMILIES:
        model = create_model(f"{family}-{size}", input_size=latent).to(device).eval()
        for parameter in model.parameters():  # a fresh SiT predicts zero
            nn.init.normal_(parameter, std=0.02)
        if options.compile:
            model.compile_repeated_blocks()
        runs[family] = call(model, options.batch_size, latent, device)
    return {
        "size": size,
        "latent": latent,
        "batch": options.batch_size,
        "compiled": options.compile,
        "milliseconds": median_milliseconds(runs, device, options.turns),
        "mebibytes": {family: peak_mebibytes(run, device) for family, run in runs.items()},
    }


def call(model: SiT, B: int, latent: int, device: torch.device) -> Run:
    """A forward pass, in bf16 on a GPU and fp32 on a CPU."""
    x, t = torch.randn(B, 4, latent, latent, device=device), torch.rand(B, device=device)
    y = torch.arange(B, device=device) % 1000

    def run() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model(x, t, y)

    return run


if __name__ == "__main__":
    main()
