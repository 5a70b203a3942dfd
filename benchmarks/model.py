"""Whole models, as in Table VIII and Fig. 6 of the ATConv paper (arXiv 2510.20092): `python -m benchmarks.model`.

Measures forward passes of attention, hybrid and ATConv models in turns, for several sizes and latent sizes, and those
of attention and ATConv models computed like their released programs. `--sizes B/2 L/2 XL/2 --latents 32 64` gives the
nine models of Table VIII, whose ratios of latency to attention are printed beside ours. `benchmarks.figures` draws
throughput against latent size.

`--mixers NAME ...` compares models with one registered mixer in all blocks instead, as
`python -m sit_atconv.study costs` compares any models: forward passes, training steps, memory, operations.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from benchmarks.baselines import ReleasedSiT
from benchmarks.mixers import add_mixers
from benchmarks.output import write_json
from sit_atconv import create_model, list_models
from sit_atconv.config import ModelConfig
from sit_atconv.errors import exit_on_input_error
from sit_atconv.models import SiT
from sit_atconv.models.mixers import list_mixers
from sit_atconv.runtime.measuring.memory import peak_mebibytes
from sit_atconv.runtime.measuring.records import machine
from sit_atconv.runtime.measuring.timing import default_device, median_milliseconds
from sit_atconv.study.costs.command import describe, examine
from sit_atconv.study.costs.command import measure as measure_models
from sit_atconv.study.costs.passes import forward_pass

FAMILIES = ("SiT", "SiT-Hybrid", "SiT-ATConv")
RELEASED = {"SiT": "SiT, released", "SiT-ATConv": "SiT-ATConv, released"}
SIZES = [name.removeprefix("SiT-ATConv-") for name in list_models("SiT-ATConv-*")]
DEFAULTS = {"cpu": (["S/2"], [8, 16, 32, 64], 2), "cuda": (["B/2", "L/2", "XL/2"], [32, 64, 128], 64)}
# Latencies of the three families in Table VIII, by size and latent: whole sampling runs, in the paper's own unit.
PUBLISHED = {
    ("B/2", 32): (31.17, 27.41, 25.45),
    ("L/2", 32): (97.44, 89.71, 82.22),
    ("XL/2", 32): (139.44, 121.52, 113.05),
    ("B/2", 64): (139.64, 112.43, 103.14),
    ("L/2", 64): (412.71, 375.19, 341.01),
    ("XL/2", 64): (647.75, 565.96, 501.39),
}


def main() -> None:
    device = default_device()
    sizes, latents, batch = DEFAULTS[device.type]
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    add_mixers(parser)
    parser.add_argument("--sizes", nargs="+", default=sizes, choices=SIZES, metavar="SIZE", help="such as B/2 XL/2")
    parser.add_argument("--latents", type=int, nargs="+", default=latents, help="height and width of a latent")
    parser.add_argument("--batch-size", type=int, default=batch)
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks of each model")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("model.json"))
    options = parser.parse_args()
    compare = compare_families if options.mixers is None else compare_mixers
    write_json(options.json, device, compare(options, device))


def compare_mixers(options: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure models that have one of the mixers in all blocks, in turns for each size, and print a table."""
    rows = []
    for size in options.sizes:
        for latent in options.latents:
            names = options.mixers or list_mixers()
            models = {f"SiT-{size}, {name}": ModelConfig(f"SiT-{size}", mixer_pattern=name) for name in names}
            subjects = {title: examine(title, config, latent) for title, config in models.items()}
            rows += measure_models(subjects, latent, options, device)
    print(f"{machine(device)}, batch {options.batch_size}\n\n{describe(rows, options.batch_size)}")
    return rows


def compare_families(options: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure the three families and their released programs, and print a line for each size."""
    rows = []
    print(f"{machine(device)}, batch {options.batch_size}. Milliseconds per image; hybrid and ATConv over attention;")
    print("the same in Table VIII; released attention and ATConv over ours; peak MiB of a batch beyond the weights.\n")
    names = f"{'attention':>10} {'hybrid':>9} {'ATConv':>9}"
    print(f"{'size':6} {'latent':>6} {names} {'ratios':>13} {'published':>13} {'released':>11} {names}")
    for size in options.sizes:
        for latent in options.latents:
            rows.append(measure(size, latent, options, device))
            print(line(rows[-1]))
    return rows


def line(row: dict) -> str:
    ms = [row["milliseconds"][family] / row["batch"] for family in FAMILIES]
    published = PUBLISHED.get((row["size"], row["latent"]), ())
    cells = [f"{row['size']:6} {row['latent']:6} {ms[0]:10.2f} {ms[1]:9.2f} {ms[2]:9.2f}"]
    cells += [
        f"{' '.join(f'{each / values[0]:.3f}' for each in values[1:]):>13}" if values else " " * 13
        for values in (ms, published)
    ]
    cells.append(" ".join(f"{row['milliseconds'][RELEASED[f]] / row['milliseconds'][f]:5.2f}" for f in RELEASED))
    memory = [row["mebibytes"][family] for family in FAMILIES]
    cells += [f"{'-':>9}" if each is None else f"{each:9.1f}" for each in memory]
    return " ".join(cells)


def measure(size: str, latent: int, options: argparse.Namespace, device: torch.device) -> dict:
    """Measure the families at one size, and the released programs with the same weights, in turns."""
    torch.compiler.reset()
    runs = {}
    for family in FAMILIES:
        model = build(f"{family}-{size}", latent, device)
        if family in RELEASED:
            runs[RELEASED[family]] = forward_pass(ReleasedSiT(model), options.batch_size, latent, device)
        if options.compile:
            model.compile_repeated_blocks()
        runs[family] = forward_pass(model, options.batch_size, latent, device)
    return {
        "size": size,
        "latent": latent,
        "batch": options.batch_size,
        "compiled": options.compile,
        "milliseconds": median_milliseconds(runs, device, options.turns),
        "mebibytes": {name: peak_mebibytes(run, device) for name, run in runs.items()},
    }


def build(name: str, latent: int, device: torch.device) -> SiT:
    with device:  # weights are drawn there: on a CPU, those of XL take seconds
        model = create_model(name, input_size=latent).eval()
    for parameter in model.parameters():  # a fresh SiT predicts zero
        nn.init.normal_(parameter, std=0.02)
    return model


if __name__ == "__main__":
    with exit_on_input_error():
        main()
