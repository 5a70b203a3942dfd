"""Compares all solvers from the same noise: `python -m benchmarks.solvers --checkpoint MODEL [--png GRID.png]`.

Prints the counted number of network evaluations per image, and the distance of each solver's images from those of 1,000
Heun steps, for each of the `--steps`. The grid has a row for each solver, with the last of these.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.output import write_json
from sit_atconv.models import SiT
from sit_atconv.runtime.measuring.timing import default_device
from sit_atconv.sampling import SOLVERS, SamplerSettings, generate, open_generator
from sit_atconv.sampling.writing.grid import save_grid

GUIDED = {
    "no guidance": {},
    "guided": {"guidance": 1.5},
    "guided in [0, 0.7]": {"guidance": 1.5, "interval": (0.0, 0.7)},
}


class Counter:
    """Counts the rows of a model's inputs."""

    def __init__(self, model: SiT) -> None:
        self.rows = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, _: SiT, inputs: tuple[Tensor, ...]) -> None:
        self.rows += len(inputs[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[50])
    parser.add_argument("--num-samples", type=int, default=10)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", type=Path, default=Path("solvers.json"))
    options = parser.parse_args()

    device = default_device()
    model, autoencoder = open_generator(options.checkpoint, device=device)
    counter, rows = Counter(model), range(options.num_samples)
    labels = ",".join(map(str, range(model.config.num_classes))) or "balanced"

    def draw(settings: SamplerSettings) -> Tensor:
        return torch.cat([batch.images for batch in generate(model, autoencoder, rows, settings, labels=labels)])

    exact = draw(SamplerSettings("heun", 1000)).float()
    found: list[dict] = []
    for steps in options.steps:
        pictures = []
        for solver in (each for each in SOLVERS if each != "meanflow"):  # which is of flow maps
            calls = {}
            for name, guidance in GUIDED.items() if model.config.num_classes else [("no guidance", {})]:
                counter.rows = 0
                images = draw(replace(SamplerSettings(), solver=solver, steps=steps, **guidance))
                calls[name] = counter.rows / len(rows)
                if name == "no guidance":
                    pictures.append(images)
                    distance = (images.float() - exact).square().mean().sqrt().item()
            found.append({"solver": solver, "steps": steps, "calls": calls, "distance": distance})
        show(steps, [row for row in found if row["steps"] == steps])
    print(f"\nThe distance is the root mean square of grey levels, of {len(rows)} images.")
    if options.png:
        save_grid(torch.cat(pictures), len(rows), options.png)
    write_json(options.json, device, found)


def show(steps: int, rows: list[dict]) -> None:
    """Print the table of one number of steps."""
    columns = list(rows[0]["calls"])
    title = f"evaluations, {steps} steps"
    print(f"\n{title:24}" + "".join(f"{column:>20}" for column in columns) + f"{'to exact ODE':>16}")
    for row in rows:
        stochastic = SamplerSettings(row["solver"]).stochastic
        far = f"{'(other images)':>16}" if stochastic else f"{row['distance']:16.2f}"
        print(f"{row['solver']:24}" + "".join(f"{row['calls'][column]:20.1f}" for column in columns) + far)


if __name__ == "__main__":
    main()
